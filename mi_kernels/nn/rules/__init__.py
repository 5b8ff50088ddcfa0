"""Ready rules of :func:`mi_kernels.convert` for layers of other packages.

Each function imports its package when it is called, not before, and returns a dictionary for ``rules``;
``mi.nn.rules.pykeen() | mi.nn.rules.supar()`` are two of them. A rule changes the class of a layer to a
subclass of that, which calls this package: parameters, state dict, hooks and all attributes stay. A layer
that it cannot express is left alone, with the reason. What a rule has made cannot be scripted by TorchScript,
also where the package's layer can.
"""

from torch import nn

from .._substitute import Rule

__all__ = [
    "diffusers",
    "dit",
    "multibench",
    "pykeen",
    "supar",
    "timm",
    "torch_geometric",
    "transformers",
    "x_transformers",
]


def torch_geometric() -> dict[type[nn.Module], Rule]:
    r"""Rules for ``torch_geometric.nn``: NNConv (ECConv), RGCNConv, FastRGCNConv and FiLMConv.

    ``NNConv``, where its ``nn`` is an ``nn.Linear`` or an ``nn.Sequential`` that ends with one: the message
    :math:`x_j \Theta(e_{ij})` without the weight of each edge, of in x out numbers. A network that changes
    later so that this does not hold (hooks on its last layer, another layer) is computed as before.
    ``FastRGCNConv`` without ``num_blocks``: the weight of each edge is read where it lies, not copied.
    ``RGCNConv`` without ``num_blocks``, summed or averaged: a product for each edge instead of one for each
    node and relation, where these are at least twice as many (there are messages of all edges at once then,
    as in FastRGCNConv); else, and for hooks on parts of ``propagate``, sparse tensors and numbers of nodes
    instead of features, as before. A type of an edge below 0 is an error, which FastRGCNConv counted from the
    end.

    ``FiLMConv`` of several relations, summed or averaged, with linear layers and an activation of torch.nn:
    products for the pairs of a node and a relation that occur, under the same conditions; with edges of types
    that it does not know, which it leaves out, as before. With one relation its message is one multiplication
    and addition, which gains nothing.

    Returns:
        A dictionary for ``mi.convert(model, rules=...)``.

    Raises:
        ImportError: torch_geometric cannot be imported.

    Source: Gilmer et al., "Neural Message Passing for Quantum Chemistry", ICML 2017; Schlichtkrull et al.,
    "Modeling Relational Data with Graph Convolutional Networks", ESWC 2018; Brockschmidt,
    "GNN-FiLM", ICML 2020.

    Example:
        >>> mi.convert(model, rules=mi.nn.rules.torch_geometric())  # doctest: +SKIP
    """
    try:
        from . import _torch_geometric as found
    except ImportError as error:
        raise _cannot("torch_geometric", "pip install torch_geometric", error) from error
    return dict(found.RULES)


def pykeen() -> dict[type[nn.Module], Rule]:
    r"""Rules for ``pykeen.nn.modules``: TuckERInteraction.

    :math:`\mathcal{Z} \times_1 h \times_2 r` is one call, without the matrix of each relation
    :math:`\mathcal{Z} \times_2 r`. While training with ``relation_dropout`` above zero that matrix is made as
    before, with the same random numbers, as the dropout is of its entries. Scores of all pairs (one tail for
    every entity) are a matrix product in both cases.

    Returns:
        A dictionary for ``mi.convert(model, rules=...)``.

    Raises:
        ImportError: pykeen cannot be imported.

    Source: Balazevic et al., "TuckER: Tensor Factorization for Knowledge Graph Completion", EMNLP 2019.

    Example:
        >>> mi.convert(model, rules=mi.nn.rules.pykeen())  # doctest: +SKIP
    """
    try:
        from . import _pykeen as found
    except ImportError as error:
        raise _cannot("pykeen", "pip install pykeen", error) from error
    return dict(found.RULES)


def supar() -> dict[type[nn.Module], Rule]:
    r"""Rules for ``supar.modules``: Biaffine.

    :math:`s_{oxy} = [x; 1]^T W_o [y; 1] / d^s` without padded copies of the inputs. In versions of supar
    whose Biaffine has more parts than a weight (projections, a decomposed weight) layers are left alone.

    Returns:
        A dictionary for ``mi.convert(model, rules=...)``.

    Raises:
        ImportError: supar cannot be imported.

    Source: Dozat and Manning, "Deep Biaffine Attention for Neural Dependency Parsing", ICLR 2017.

    Example:
        >>> mi.convert(model, rules=mi.nn.rules.supar())  # doctest: +SKIP
    """
    try:
        from . import _supar as found
    except ImportError as error:
        raise _cannot("supar", "pip install supar", error) from error
    return dict(found.RULES)


def multibench() -> dict[type[nn.Module], Rule]:
    r"""Rules for MultiBench's ``fusions.common_fusions``.

    ``MultiplicativeInteractions2Modal``: the outputs ``"matrix3D"`` and ``"matrix"``, without the weight of
    each sample; ``flatten``, ``clip``, ``grad_clip`` and ``flip`` as before.
    ``MultiplicativeInteractions3Modal`` consists of two such layers. Layers with the outputs ``"vector"`` and
    ``"scalar"`` have no such weight, and are left alone.

    ``LowRankTensorFusion`` of two modalities: :func:`mi_kernels.low_rank` with a sum over the ranks, without
    the products of each modality for each rank. Factors are copied for that, in another layout and one of
    them with the weights of the ranks. So it is for large batches, where these products have 2^21 elements
    and rows are six times as many as features; others are computed as before. More than two modalities are
    left alone.

    Returns:
        A dictionary for ``mi.convert(model, rules=...)``.

    Raises:
        ImportError: ``fusions.common_fusions`` cannot be imported: MultiBench is a repository, no package.

    Source: Liang et al., "MultiBench", NeurIPS 2021; Jayakumar et al., ICLR 2020; Liu et al.,
    "Efficient Low-rank Multimodal Fusion", ACL 2018.

    Example:
        >>> mi.convert(model, rules=mi.nn.rules.multibench())  # doctest: +SKIP
    """
    try:
        from . import _multibench as found
    except ImportError as error:
        advice = "put a clone of https://github.com/pliang279/MultiBench on sys.path"
        raise _cannot("multibench", advice, error, "fusions.common_fusions") from error
    return dict(found.RULES)


def transformers() -> dict[type[nn.Module], Rule]:
    r"""Rules for the gated MLPs of ``transformers``, of all models that are imported by now.

    :math:`D (\mathrm{act}(G x) \cdot (V x))` with one call for G, V, the activation and product: LlamaMLP
    and whichever other class has a forward of this formula, under any names of its layers, with G and V apart
    (Mistral, Qwen, Gemma, T5DenseGatedActDense, ...) or packed (Phi3, GLM, ModernBERT, ...), and with layers
    such as dropout or a norm before D. That is found out from the forward of each class, so that a version
    of the package that computes something else is left alone. What comes behind the product is called as
    before. Build or load the model first: the classes are those of imported modules.

    A layer is left alone whose activation is not exactly one of :func:`mi_kernels.glu`, or whose G or V is no
    plain ``nn.Linear`` (quantised, with an adapter, with hooks). Where that is so only later, or dtypes of
    x and weights differ, the package's own forward runs. Experts (MixtralExperts and others) are not
    concerned: there, products of rows in groups are the package's own.

    Returns:
        A dictionary for ``mi.convert(model, rules=...)``.

    Raises:
        ImportError: transformers cannot be imported.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020; Touvron et al., "LLaMA", 2023; Raffel et al.,
    "T5", JMLR 2020.

    Example:
        >>> mi.convert(model, rules=mi.nn.rules.transformers())  # doctest: +SKIP
    """
    try:
        from . import _transformers as found
    except ImportError as error:
        raise _cannot("transformers", "pip install transformers", error) from error
    return found.rules()


def timm() -> dict[type[nn.Module], Rule]:
    r"""Rules for ``timm.layers``: GluMlp, of which SwiGLUPacked is one, and SwiGLU.

    One call for both linear layers, the activation and their product; dropout, norm and the last layer are
    called as before. Layers of convolutions (``use_conv``), with other activations than those of
    :func:`mi_kernels.glu`, or with hooks on the first layers are left alone; where that is so only later, or
    dtypes of x and weights differ, timm's own forward runs.

    Returns:
        A dictionary for ``mi.convert(model, rules=...)``.

    Raises:
        ImportError: timm cannot be imported.

    Source: Wightman, "PyTorch Image Models", 2019; Shazeer, "GLU Variants Improve Transformer", 2020.

    Example:
        >>> mi.convert(model, rules=mi.nn.rules.timm())  # doctest: +SKIP
    """
    try:
        from . import _timm as found
    except ImportError as error:
        raise _cannot("timm", "pip install timm", error) from error
    return dict(found.RULES)


def x_transformers() -> dict[type[nn.Module], Rule]:
    r"""Rules for ``x_transformers``: GLU, the first half of its FeedForward with ``glu=True``.

    One call for its linear layer, the activation and the product; ``mult_bias`` is multiplied as before.
    Layers with ``softclamp``, with other activations than those of :func:`mi_kernels.glu`, or with hooks on
    the linear layer are left alone, and computed as before where that is so only later.

    Returns:
        A dictionary for ``mi.convert(model, rules=...)``.

    Raises:
        ImportError: x_transformers cannot be imported.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.

    Example:
        >>> mi.convert(model, rules=mi.nn.rules.x_transformers())  # doctest: +SKIP
    """
    try:
        from . import _x_transformers as found
    except ImportError as error:
        raise _cannot("x_transformers", "pip install x-transformers", error) from error
    return dict(found.RULES)


def diffusers() -> dict[type[nn.Module], Rule]:
    r"""Rules for the adaptive norms of ``diffusers.models.normalization``.

    :math:`\mathrm{norm}(x) (1 + \gamma) + \beta` with one call for the norm and the modulation:
    ``AdaLayerNorm``, ``AdaLayerNormZero``, ``AdaLayerNormZeroSingle``, ``AdaLayerNormContinuous``,
    ``SD35AdaLayerNormZeroX``, ``LuminaRMSNormZero``, ``LuminaLayerNormContinuous``,
    ``CogView3PlusAdaLayerNormZeroTextImage``, ``CogVideoXLayerNormZero`` and ``AdaGroupNorm``, as far as the
    version has them. Embeddings, activations and linear layers are called as before, and the results are the
    same ones: gates, and what belongs to the MLP behind. ``AdaLayerNormSingle`` makes modulation but applies
    none.

    A layer is left alone whose norm is another one than ``nn.LayerNorm`` or diffusers' ``FP32LayerNorm`` and
    ``RMSNorm``, or has hooks, or whose forward takes other arguments. Where that is so only later, dtypes of
    x and modulation differ, or under autocast, the steps are those of diffusers. In float64 statistics have
    float64, where those two have float32.

    Returns:
        A dictionary for ``mi.convert(model, rules=...)``.

    Raises:
        ImportError: diffusers cannot be imported.

    Source: von Platen et al., "Diffusers", 2022; Peebles and Xie, "Scalable Diffusion Models with
    Transformers", ICCV 2023.

    Example:
        >>> mi.convert(model, rules=mi.nn.rules.diffusers())  # doctest: +SKIP
    """
    try:
        from . import _diffusers as found
    except ImportError as error:
        raise _cannot("diffusers", "pip install diffusers", error) from error
    return dict(found.RULES)


def dit() -> dict[type[nn.Module], Rule]:
    r"""Rules for DiTBlock and FinalLayer of DiT, in whichever repository they were copied to.

    The blocks of facebookresearch/DiT are no package: every class that is imported by now is taken whose
    forward computes

    .. math::
        x' = x + g_1 \, \mathrm{attn}(\mathrm{norm1}(x) (1 + \gamma_1) + \beta_1), \quad
        y = x' + g_2 \, \mathrm{mlp}(\mathrm{norm2}(x') (1 + \gamma_2) + \beta_2)

    of six chunks (beta, gamma, g, twice) of ``adaLN_modulation(c)``, or
    ``linear(norm_final(x) (1 + gamma) + beta)`` of two, under these names. That is found out from the
    forward of each class, so that one that computes something else is left alone. Each norm is one call with
    its modulation, the second one with the residual before it; attn, mlp, adaLN_modulation and linear are
    called as before. Import the model's file first.

    A layer is left alone whose norms are not ``nn.LayerNorm`` or ``nn.RMSNorm``, or have hooks. Where that is
    so only later, dtypes differ, c is not ``[B, C]`` or under autocast, its own forward runs.

    Returns:
        A dictionary for ``mi.convert(model, rules=...)``.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023.

    Example:
        >>> mi.convert(model, rules=mi.nn.rules.dit())  # doctest: +SKIP
    """
    from . import _dit as found

    return found.rules()


def _cannot(name: str, advice: str, error: ImportError, module: str | None = None) -> ImportError:
    return ImportError(f"mi.nn.rules.{name}: cannot import {module or name} ({error}): {advice}")
