// Multiplicative RNNs on the CPU: registration, checks, order of the rows, plan and threads; the steps are in
// kernels/recurrent*.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/allocate.h"
#include "common/registration.h"
#include "common/tensor_args.h"
#include "common/text.h"
#include "cpu/dispatch/huge_pages.h"
#include "cpu/dispatch/isa.h"
#include "cpu/dispatch/plan.h"
#include "cpu/dispatch/recurrent_arguments.h"
#include "cpu/dispatch/workspace.h"
#include "cpu/kernels/recurrent_call.h"

namespace mi_kernels {
namespace {

// Rows of a chain: enough for each matrix to be read from far away for many rows.
constexpr int64_t kChainRows = 64;
constexpr int64_t kTileRows = 8;  // of any instruction set
// Operations of one step of a chain from which its members gain more than meeting after each product costs them, a
// microsecond or two.
constexpr int64_t kWorthMeeting = int64_t(1) << 19;

RecurrentMatrix matrix_of(const MulTraits& mul, int64_t units, int64_t gates, int64_t depth, int64_t outer = 1) {
  RecurrentMatrix m{units, gates, depth, outer};
  m.words = std::max<int64_t>(ceil_div(depth, mul.pair), 1);
  m.vectors = ceil_div(units, mul.lanes);
  m.bytes = scratch_bytes(m.vectors * mul.lanes * gates * m.words * outer * mul.word_bytes);
  return m;
}

// Rows of a single step up to which reading a matrix as it is costs less than packing it.
constexpr int64_t kRowsInPlace = 16;

// The matrices of the steps, or transposed those of the backward pass.
void set_matrices(RecurrentPlan& plan, const RecurrentCall& c, DType dtype, const MulTraits& mul, bool backward) {
  const bool gru = c.cell == RecurrentCell::gru;
  const int64_t features = c.gates() * c.units, bytes = storage_bytes(dtype);
  const bool may_stay = c.steps == 1 && c.rows <= kRowsInPlace && mul.word_bytes == bytes * mul.pair;
  // Rows of `weight`, from `first` on, are the units of the gates, or the elements along the depth if it is transposed.
  // That of an empty one is null.
  const auto add = [&](RecurrentProduct product, bool present, const TensorRef& weight, int64_t units, int64_t gates,
                       int64_t depth, int64_t first = 0, int64_t outer = 1) {
    if (!present) return;
    RecurrentMatrix& m = plan.matrix[product];
    m = backward ? matrix_of(mul, depth, 1, units * gates, outer) : matrix_of(mul, units, gates, depth, outer);
    m.weight = weight;
    if (weight.data) m.weight.data = static_cast<const char*>(weight.data) + first * weight.row * bytes;
    if (backward) std::swap(m.weight.row, m.weight.col);
    const bool scaled = product == kOfReset && !gru;
    m.in_place = may_stay && m.weight.col == 1 && !scaled && m.depth > 0;
    if (m.in_place) m.bytes = 0;
  };
  add(kOfState, c.has_state_product, c.weight_hh, c.units, gru ? 2 : c.gates(), c.state);
  add(kOfReset, gru, c.weight_hh, c.units, 1, c.units, 2 * c.units);
  const WeightRef& w = c.weight;
  add(kOfReset, c.dense(), {w.data, w.width, w.out, w.context}, c.units, 1, c.state, 0, c.factors);
  add(kFactors, c.factored(), c.weight_mh, c.factors, 1, c.state);
  add(kOfFactors, c.factored(), c.weight_hm, c.units, c.gates(), c.factors);
  add(kOfHidden, c.projected, c.weight_hr, c.state, 1, c.units);
  const int64_t widths[kRecurrentOperands] = {backward ? features : c.state, backward ? features : c.state,
                                              gru ? c.units : c.factors, backward ? c.state : c.units};
  const int64_t element = mul.word_bytes / mul.pair;
  // A line more than whole lines: rows a power of two apart would share a few sets of the cache.
  for (int o = 0; o < kRecurrentOperands; ++o)
    plan.stride[o] = (scratch_bytes(widths[o] * element) + kScratchAlign) / element;
}

RecurrentPlan plan_recurrent(const RecurrentCall& c, DType dtype, const MulTraits& mul, bool backward) {
  RecurrentPlan plan{};
  set_matrices(plan, c, dtype, mul, backward);
  plan.chains = ceil_div(c.rows, kChainRows);
  plan.chain_rows = round_up(ceil_div(c.rows, plan.chains), kTileRows);
  plan.chains = ceil_div(c.rows, plan.chain_rows);
  int64_t most_panels = 1, most_gates = 1, elements = 0;
  for (RecurrentMatrix& m : plan.matrix) {
    m.offset = plan.shared_bytes;
    plan.shared_bytes += m.bytes;
    most_panels = std::max(most_panels, ceil_div(m.vectors, 3));
    most_gates = std::max(most_gates, m.gates);
    if (m.vectors > 0) elements += m.units * m.gates * m.depth * m.outer;
  }
  plan.operations = 2 * plan.chain_rows * elements;
  plan.unit_stride = round_up(c.units, mul.lanes);
  const int64_t element = mul.word_bytes / mul.pair;
  const auto carve = [&](int64_t& offset, int64_t bytes) {
    offset = plan.chain_bytes;
    plan.chain_bytes += scratch_bytes(bytes);
  };
  for (int o = 0; o < kRecurrentOperands; ++o)
    carve(plan.operand_offset[o], plan.chain_rows * plan.stride[o] * element);
  carve(plan.cell_offset, plan.chain_rows * plan.unit_stride * mul.acc_bytes);
  carve(plan.extra_offset, plan.chain_rows * plan.unit_stride * mul.acc_bytes);
  carve(plan.sums_offset, backward && c.integrated() ? 4 * c.gates() * c.units * 8 : 0);
  carve(plan.team_offset, (8 + most_panels) * 8);
  plan.worker_bytes = scratch_bytes(most_gates * plan.chain_rows * 3 * mul.lanes * mul.acc_bytes);
  const int64_t threads = torch::stable::get_num_threads();
  const bool share = plan.operations >= kWorthMeeting && plan.chains < 4 * threads;
  plan.members = share ? std::max<int64_t>(std::min(threads, most_panels), 1) : 1;
  return plan;
}

// Rows by decreasing length, and how many make each step.
struct RowOrder {
  std::vector<int64_t> row_of, active;
};

RowOrder order_rows(const char* op, const Optional& lengths, RecurrentCall& call) {
  RowOrder order;
  if (!lengths.has_value()) return order;
  const auto* length = static_cast<const int64_t*>(lengths->const_data_ptr());
  const int64_t stride = lengths->stride(0);
  order.row_of.resize(size_t(call.rows));
  order.active.resize(size_t(call.steps));
  for (int64_t b = 0; b < call.rows; ++b) {
    const int64_t own = length[b * stride];
    STD_TORCH_CHECK(own >= 0 && own <= call.steps, op, ": lengths: expected numbers from 0 to T=", call.steps, ", got ",
                    own);
    order.row_of[size_t(b)] = b;
    if (own > 0) ++order.active[size_t(own - 1)];
  }
  for (int64_t t = call.steps - 2; t >= 0; --t) order.active[size_t(t)] += order.active[size_t(t + 1)];
  std::stable_sort(order.row_of.begin(), order.row_of.end(),
                   [&](int64_t a, int64_t b) { return length[a * stride] > length[b * stride]; });
  call.row_of = order.row_of.data();
  call.active = order.active.data();
  return order;
}

// Tensors that have to live as long as a call, contiguous.
struct __attribute__((visibility("hidden"))) Contiguous {
  std::vector<Tensor> kept;
  const void* operator()(const Tensor& t) {
    kept.push_back(torch::stable::contiguous(t));
    return kept.back().const_data_ptr();
  }
  const void* operator()(const Optional& t) { return t.has_value() ? (*this)(*t) : nullptr; }
};

void set_operands(RecurrentCall& call, const RecurrentArguments& a, Contiguous& contiguous) {
  call.gates_x = contiguous(a.gates_x);
  call.factors_x = contiguous(a.factors_x);
  call.h0 = contiguous(a.h0);
  call.c0 = contiguous(a.c0);
  call.integration = contiguous(a.integration);
  call.weight_hh = tensor_ref(a.weight_hh, false);
  call.weight_hm = tensor_ref(a.weight_hm, false);
  call.weight_mh = tensor_ref(a.weight_mh, false);
  call.weight_hr = tensor_ref(a.weight_hr, false);
  if (a.weight.has_value())
    call.weight = {a.weight->const_data_ptr(), 0, a.weight->stride(0), a.weight->stride(1), a.weight->stride(2)};
}

template <class Call>
void run(void (*kernel)(DType, const Call&, const RecurrentPlan&, const Executor&), DType dtype, const Call& call,
         const Tensor& like, bool backward) {
  const RecurrentPlan plan = plan_recurrent(call, dtype, selected_kernels().mul_traits(dtype), backward);
  const int64_t bytes = plan.shared_bytes + plan.chains * plan.chain_bytes;
  WorkspaceSize size(plan.chains * plan.members, plan.operations * plan.chains * call.steps, plan.worker_bytes, bytes);
  const Workspace workspace(like, size);
  prefer_huge_pages(workspace.executor.partials, bytes);
  kernel(dtype, call, plan, workspace.executor);
}

// With lengths, steps that a row does not make are zero.
Tensor allocate_result(const Tensor& like, std::initializer_list<int64_t> sizes, bool zero) {
  Tensor result = on_huge_pages(allocate(like, sizes));
  if (zero) torch::stable::zero_(result);
  return result;
}

// A result that no step may write.
Tensor copy_of(const Tensor& t) {
  Tensor result = allocate(t, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()));
  torch::stable::copy_(result, t);
  return result;
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Seven recurrent(const Tensor& gates_x, const Optional& factors_x, const Tensor& h0, const Optional& c0,
                const Optional& weight_hh, const Optional& weight_hm, const Optional& weight_mh, const Optional& weight,
                const Optional& weight_hr, const Optional& integration, const Optional& lengths, Text kind,
                Text activation, bool reverse, bool keep) {
  constexpr const char* op = "recurrent";
  const RecurrentArguments a{gates_x,   factors_x, h0,        c0,          weight_hh, weight_hm,
                             weight_mh, weight,    weight_hr, integration, lengths};
  RecurrentStepsCall call{};
  const DType dtype = check_recurrent(op, a, kind, activation, reverse, call);
  const int64_t steps = call.steps, rows = call.rows, units = call.units;
  const bool lstm = call.cell == RecurrentCell::lstm, zero = lengths.has_value();
  const auto result = [&](bool wanted, int64_t features) {
    return wanted ? allocate_result(gates_x, {steps, rows, features}, zero) : allocate(gates_x, {0});
  };
  Tensor out = result(true, call.state);
  Tensor gates = result(keep && lstm && call.factored(), 4 * units);
  Tensor products = result(keep && !call.dense(), call.factored() ? call.factors : call.gates() * units);
  Tensor hidden = result(keep && weight_hr.has_value(), units);
  Tensor cells = allocate_wide(gates_x, keep && lstm, {steps, rows, units});
  if (zero && cells.numel() > 0) torch::stable::zero_(cells);
  Tensor h_n = copy_of(h0), c_n = lstm ? copy_of(*c0) : allocate(gates_x, {0});
  if (steps * rows * units > 0) {
    Contiguous contiguous;
    set_operands(call, a, contiguous);
    const RowOrder order = order_rows(op, lengths, call);
    const auto data = [](Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
    call.out = out.mutable_data_ptr();
    call.h_n = h_n.mutable_data_ptr();
    call.c_n = data(c_n);
    call.gates_kept = data(gates);
    call.products = data(products);
    call.cells = data(cells);
    call.hidden = data(hidden);
    run(selected_kernels().recurrent, dtype, call, gates_x, false);
  }
  return {out, h_n, c_n, gates, products, cells, hidden};
}

std::tuple<Tensor, Tensor, Tensor> recurrent_tangents(
    const Tensor& gates_t, const Optional& factors_t, const Optional& products_t, const Optional& out_t,
    const Tensor& h0_t, const Optional& c0_t, const Tensor& gates_x, const Optional& factors_x, const Tensor& h0,
    const Optional& c0, const Tensor& out, const Optional& gates, const Optional& products, const Optional& cells,
    const Optional& weight_hh, const Optional& weight_hm, const Optional& weight_mh, const Optional& weight,
    const Optional& weight_hr, const Optional& integration, const Optional& lengths, Text kind, Text activation,
    bool reverse) {
  constexpr const char* op = "recurrent_tangents";
  const RecurrentArguments a{gates_x,   factors_x, h0,        c0,          weight_hh, weight_hm,
                             weight_mh, weight,    weight_hr, integration, lengths};
  RecurrentStepsCall call{};
  const DType dtype = check_recurrent(op, a, kind, activation, reverse, call);
  check_kept(op, call, gates_x, out, gates, products, cells);
  check_tangents(op, call, gates_x, gates_t, factors_t, products_t, out_t, h0_t, c0_t);
  const bool lstm = call.cell == RecurrentCell::lstm;
  Tensor result = allocate_result(gates_x, {call.steps, call.rows, call.state}, lengths.has_value());
  Tensor h_n = copy_of(h0_t), c_n = lstm ? copy_of(*c0_t) : allocate(gates_x, {0});
  if (call.steps * call.rows * call.units > 0) {
    Contiguous contiguous;
    set_operands(call, a, contiguous);
    const RowOrder order = order_rows(op, lengths, call);
    call.tangents = true;
    call.out = result.mutable_data_ptr();
    call.h_n = h_n.mutable_data_ptr();
    call.c_n = lstm ? c_n.mutable_data_ptr() : nullptr;
    call.gates_t = contiguous(gates_t);
    call.factors_t = contiguous(factors_t);
    call.products_t = contiguous(products_t);
    call.out_t = contiguous(out_t);
    call.h0_t = contiguous(h0_t);
    call.c0_t = contiguous(c0_t);
    call.kept_out = contiguous(out);
    call.kept_gates = contiguous(gates);
    call.kept_products = contiguous(products);
    call.kept_cells = contiguous(cells);
    run(selected_kernels().recurrent, dtype, call, gates_x, false);
  }
  return {result, h_n, c_n};
}

Seven recurrent_grads(const Optional& grad, const Optional& grad_h, const Optional& grad_c, const Tensor& gates_x,
                      const Optional& factors_x, const Tensor& h0, const Optional& c0, const Tensor& out,
                      const Optional& gates, const Optional& products, const Optional& cells, const Optional& weight_hh,
                      const Optional& weight_hm, const Optional& weight_mh, const Optional& weight,
                      const Optional& weight_hr, const Optional& integration, const Optional& lengths, Text kind,
                      Text activation, bool reverse) {
  constexpr const char* op = "recurrent_grads";
  const RecurrentArguments a{gates_x,   factors_x, h0,        c0,          weight_hh, weight_hm,
                             weight_mh, weight,    weight_hr, integration, lengths};
  RecurrentGradsCall call{};
  const DType dtype = check_recurrent(op, a, kind, activation, reverse, call);
  check_kept(op, call, gates_x, out, gates, products, cells);
  check_cotangents(op, call, gates_x, grad, grad_h, grad_c);
  const int64_t steps = call.steps, rows = call.rows, features = call.gates() * call.units;
  const bool zero = lengths.has_value();
  const auto result = [&](bool wanted, int64_t width) {
    return wanted ? allocate_result(gates_x, {steps, rows, width}, zero) : allocate(gates_x, {0});
  };
  Tensor dgates = result(true, features), dfactors = result(call.factored(), call.factors);
  Tensor dproducts = result(!call.dense(), call.factored() ? call.factors : features);
  Tensor dout = result(weight_hr.has_value(), call.state);
  Tensor dintegration = call.integrated() ? allocate(gates_x, {4, features}) : allocate(gates_x, {0});
  // Of rows without steps.
  const auto state_grad = [&](const Optional& given, const Tensor& like) {
    if (given.has_value()) return copy_of(*given);
    Tensor zeros = allocate(gates_x, std::vector<int64_t>(like.sizes().begin(), like.sizes().end()));
    torch::stable::zero_(zeros);
    return zeros;
  };
  Tensor dh0 = state_grad(grad_h, h0), dc0 = c0.has_value() ? state_grad(grad_c, *c0) : allocate(gates_x, {0});
  if (steps * rows * call.units == 0) {
    for (Tensor* t : {&dgates, &dfactors, &dproducts, &dintegration, &dout})
      if (t->numel() > 0) torch::stable::zero_(*t);
    return {dgates, dfactors, dproducts, dh0, dc0, dintegration, dout};
  }
  Contiguous contiguous;
  set_operands(call, a, contiguous);
  const RowOrder order = order_rows(op, lengths, call);
  const auto data = [](Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
  call.grad = contiguous(grad);
  call.grad_h = contiguous(grad_h);
  call.grad_c = contiguous(grad_c);
  call.out = contiguous(out);
  call.gates_in = contiguous(gates);
  call.products = contiguous(products);
  call.cells = contiguous(cells);
  call.dgates = dgates.mutable_data_ptr();
  call.dfactors = data(dfactors);
  call.dproducts = data(dproducts);
  call.dh0 = dh0.mutable_data_ptr();
  call.dc0 = data(dc0);
  call.dintegration = data(dintegration);
  call.dout = data(dout);
  run(selected_kernels().recurrent_grads, dtype, call, gates_x, true);
  return {dgates, dfactors, dproducts, dh0, dc0, dintegration, dout};
}

}  // namespace
}  // namespace mi_kernels

STABLE_TORCH_LIBRARY_IMPL(MI_NAMESPACE, CPU, m) {
  m.impl("recurrent", TORCH_BOX(&mi_kernels::recurrent));
  m.impl("recurrent_grads", TORCH_BOX(&mi_kernels::recurrent_grads));
  m.impl("recurrent_tangents", TORCH_BOX(&mi_kernels::recurrent_tangents));
}
