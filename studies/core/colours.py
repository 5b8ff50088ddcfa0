"""One colour for each model, in all pictures."""

COLOURS = {
    "dense MI": "#1b6ca8",
    "dense MI, each layer": "#1b6ca8",
    "dense MI, last layer": "#6fb1e0",
    "low-rank MI": "#00798c",
    "hypernetwork": "#9b5de5",
    "FiLM": "#edae49",
    "gated": "#66a182",
    "concat": "#d1495b",
}
OTHERS = ("#7f5539", "#f15bb5", "#8d99ae", "#3d405b", "#bc6c25", "#606c38")


def colour(model: str, among: list[str]) -> str:
    """Of a model with a colour of its own, else by its place among the others that are shown."""
    return COLOURS.get(model) or OTHERS[[m for m in among if m not in COLOURS].index(model) % len(OTHERS)]
