// Prints how the planner divides calls with W alone: compiled by scaling.py together with csrc/cpu/dispatch/plan*.cpp,
// which need no torch. A line of input has the primitive, G B Z X O, and lanes, pair, bytes of a word and of an
// accumulator, of products and of exact sums; a line of output
//   form tasks operations worker_bytes partial_bytes factor extent:step:unit ...
// with the axes that tasks divide, the slowest first. A task takes `factor` operations for each point of its box, in
// which each side is padded to whole units.
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "cpu/dispatch/plan.h"

using namespace mi_kernels;

namespace {

struct Axis {
  int64_t extent, step, unit = 1;
};

struct Division {
  std::string form;
  int64_t tasks, operations, worker_bytes, partial_bytes, factor;
  std::vector<Axis> axes;
};

Division forward(const ProblemSize& p, const MulTraits& m) {
  const ForwardPlan f = plan_forward(p, m, true, false, false, {});
  const bool width_inside = f.order == Order::width_inside;
  const int64_t inner = width_inside ? p.width : p.context, outer = width_inside ? p.context : p.width;
  const Axis out{p.out, f.out_step};
  Division d{width_inside ? "width_inside" : "context_inside",
             f.tasks,
             f.operations,
             f.worker_bytes,
             f.partial_bytes,
             2 * inner,
             {{p.groups, 1}, {p.rows, f.vectors * m.lanes, m.lanes}, out, {outer, f.outer_step}}};
  if (f.order != Order::stream) return d;
  d.form = "stream", d.factor = 2 * p.rows * p.context * p.width, d.axes = {{p.groups, f.group_step}, out};
  return d;
}

Division input_grads(const ProblemSize& p, const MulTraits& m) {
  const InputGradsPlan d = plan_input_grads(p, m, true, true, true, {});
  const Axis groups{p.groups, 1}, rows{p.rows, d.vectors * m.lanes, m.lanes}, context{p.context, d.context_step};
  Division found{"fused",
                 d.tasks,
                 d.operations,
                 d.worker_bytes,
                 d.partial_bytes,
                 2 * p.out,
                 {groups, rows, context, {p.width, d.width_step}}};
  if (d.form == InputForm::split) {
    found.form = "split", found.factor = 4 * p.context * p.width;
    found.axes = {groups, rows, {p.out, d.out_step}};
  } else if (d.form == InputForm::stream) {
    found.form = "stream", found.factor = 2 * p.rows * p.width;
    found.axes = {{p.groups, d.group_step}, {p.out, d.out_step}, context};
  }
  return found;
}

Division weight_grads(const ProblemSize& p, const MulTraits& products, const MulTraits& sums) {
  const WeightGradsPlan w = plan_weight_grads(p, products, sums, {true, false, false, false});
  const RegionPlan& r = w.weight;
  const int64_t lanes = w.context_lanes ? p.context : p.width, vector = r.wide ? sums.lanes : products.lanes;
  Division d{w.context_lanes ? "context_lanes" : "width_lanes",
             r.tasks,
             r.operations,
             w.worker_bytes,
             w.partial_bytes,
             2,
             {{p.groups, 1}, {r.outputs, r.out_step}, {r.extent, r.feature_step}}};
  if (w.outer)
    d.form = "outer", d.factor = 2 * lanes * p.rows, d.axes = {{p.groups * p.out * r.extent, r.row_step}};
  else
    d.axes.insert(d.axes.end(), {{lanes, r.vectors * vector, vector}, {p.rows, r.batch_step}});
  return d;
}

}  // namespace

int main() {
  std::string primitive;
  ProblemSize p;
  MulTraits m, s;
  while (std::cin >> primitive >> p.groups >> p.rows >> p.context >> p.width >> p.out >> m.lanes >> m.pair >>
         m.word_bytes >> m.acc_bytes >> s.lanes >> s.pair >> s.word_bytes >> s.acc_bytes) {
    const Division d = primitive == "forward"       ? forward(p, m)
                       : primitive == "input_grads" ? input_grads(p, m)
                                                    : weight_grads(p, m, s);
    std::cout << d.form << ' ' << d.tasks << ' ' << d.operations << ' ' << d.worker_bytes << ' ' << d.partial_bytes
              << ' ' << d.factor;
    for (const Axis& a : d.axes) std::cout << ' ' << a.extent << ':' << a.step << ':' << a.unit;
    std::cout << '\n';
  }
}
