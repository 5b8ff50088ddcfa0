#include "cpu/dispatch/row_pieces.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "common/checks.h"

namespace mi_kernels {
namespace {

using torch::headeronly::ScalarType;

template <class Body>
void for_rows(int64_t count, bool serial, const Body& body) {
  constexpr int64_t kRows = 64;
  const auto task = [&](int64_t t, int64_t) {
    for (int64_t k = t * kRows; k < std::min(count, (t + 1) * kRows); ++k) body(k);
  };
  run_on_threads(
      ceil_div(count, kRows), serial ? 1 : torch::stable::get_num_threads(),
      [](void* closure, int64_t t, int64_t w) { (*static_cast<decltype(task)*>(closure))(t, w); }, (void*)&task);
}

template <class Element>
void copy_strided(const void* from, int64_t stride, int64_t count, char* to) {
  const auto* in = static_cast<const Element*>(from);
  auto* out = reinterpret_cast<Element*>(to);
  for (int64_t i = 0; i < count; ++i) out[i] = in[i * stride];
}

// What pieces of each length need, measured once.
class Needs {
  static constexpr int64_t kKept = 1024;  // lengths above it are few
  const RunPiece& run_;
  std::vector<WorkspaceNeeds> kept_;
  WorkspaceNeeds other_;

 public:
  Needs(const RunPiece& run, int64_t longest) : run_(run), kept_(size_t(std::min(longest, kKept) + 1)) {}
  const WorkspaceNeeds& of(const RowPiece& piece) {
    if (piece.rows > kKept) other_ = {};
    WorkspaceNeeds& needs = piece.rows > kKept ? other_ : kept_[size_t(piece.rows)];
    if (needs.bytes == 0) {
      WorkspaceSource measure;
      measure.needs = &needs;
      run_(piece, measure, nullptr);
      needs.bytes = std::max<int64_t>(needs.bytes, 1);
    }
    return needs;
  }
};

bool longer(const RowPiece* a, const RowPiece* b) { return a->rows > b->rows; }

// The rows of the thread that has most of them, where a free thread takes the longest piece that is left.
int64_t side_by_side(std::vector<const RowPiece*>& pieces, int64_t all, int64_t threads) {
  std::stable_sort(pieces.begin(), pieces.end(), longer);
  std::vector<int64_t> rows(size_t(threads), 0);
  for (const RowPiece* piece : pieces) *std::min_element(rows.begin(), rows.end()) += piece->rows;
  return std::max(*std::max_element(rows.begin(), rows.end()), all / threads);
}

// Ranges of pieces that are one task each: long pieces first, short ones several at a time.
struct Tasks {
  std::vector<const RowPiece*> pieces;
  std::vector<int64_t> ends;
};

Tasks shared_tasks(const std::vector<const RowPiece*>& pieces, int64_t long_rows, int64_t task_rows) {
  Tasks tasks;
  tasks.pieces.reserve(pieces.size());
  for (const RowPiece* piece : pieces) {
    if (piece->rows < long_rows) continue;
    tasks.pieces.push_back(piece);
    tasks.ends.push_back(int64_t(tasks.pieces.size()));
  }
  std::stable_sort(tasks.pieces.begin(), tasks.pieces.end(), longer);
  constexpr int64_t kMost = 32;
  int64_t rows = 0, count = 0;
  for (const RowPiece* piece : pieces) {
    if (piece->rows >= long_rows) continue;
    tasks.pieces.push_back(piece);
    rows += piece->rows;
    if (rows < task_rows && ++count < kMost) continue;
    tasks.ends.push_back(int64_t(tasks.pieces.size()));
    rows = count = 0;
  }
  if (tasks.ends.empty() || tasks.ends.back() < int64_t(tasks.pieces.size()))
    tasks.ends.push_back(int64_t(tasks.pieces.size()));
  return tasks;
}

}  // namespace

Tensor int64_vector(const char* op, const char* name, const Tensor& t, const Tensor& like,
                    std::optional<int64_t> size) {
  check_defined(op, name, t);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, op, ": ", name, ": expected int64");
  STD_TORCH_CHECK(t.is_cpu() && like.is_cpu(), op, ": ", name, ": expected the device of the first tensor");
  STD_TORCH_CHECK(t.dim() == 1, op, ": ", name, ": expected 1 dimension, got ", t.dim());
  STD_TORCH_CHECK(!size || t.numel() == *size, op, ": ", name, ": expected N = ", size.value_or(0), " elements, got ",
                  t.numel());
  STD_TORCH_CHECK(in_range({t.numel(), 8}), op, ": ", name, ": expected at most 2^50 elements, got ", t.numel());
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

RowGroups::RowGroups(const char* op, const Tensor& row_index, const Tensor& offsets, const Tensor& like, int64_t rows)
    : index_tensor_(int64_vector(op, "row_index", row_index, like, rows)),
      offsets_tensor_(int64_vector(op, "offsets", offsets, like)),
      row_index_(static_cast<const int64_t*>(index_tensor_.const_data_ptr())),
      offsets_(static_cast<const int64_t*>(offsets_tensor_.const_data_ptr())),
      rows_(rows),
      groups_(offsets_tensor_.numel() - 1) {
  STD_TORCH_CHECK(groups_ >= 0, op, ": offsets: expected G + 1 elements, got none");
  bool ascending = offsets_[0] == 0 && offsets_[groups_] == rows;
  for (int64_t g = 0; g < groups_; ++g) ascending = ascending && offsets_[g] <= offsets_[g + 1];
  STD_TORCH_CHECK(ascending, op, ": offsets: expected ascending numbers from 0 to N = ", rows, ", got ", offsets_[0],
                  " to ", offsets_[groups_], groups_ ? "" : " for no groups");
  // A row that is missing would not be written, one that is there twice would be written by two threads.
  std::vector<uint8_t> seen(size_t(rows), 0);
  for (int64_t k = 0; k < rows; ++k) {
    STD_TORCH_CHECK(uint64_t(row_index_[k]) < uint64_t(rows), op, ": row_index: expected numbers from 0 to ", rows - 1,
                    ", got ", row_index_[k]);
    seen[size_t(row_index_[k])] = 1;
  }
  STD_TORCH_CHECK(std::find(seen.begin(), seen.end(), 0) == seen.end(), op,
                  ": row_index: expected each of the rows 0 to ", rows - 1, " once");
}

std::vector<RowPiece> RowGroups::pieces(int64_t most) const {
  std::vector<RowPiece> pieces;
  pieces.reserve(size_t(std::min(groups_, rows_) + rows_ / most));
  for (int64_t g = 0; g < groups_; ++g) {
    const int64_t rows = offsets_[g + 1] - offsets_[g];
    if (rows == 0) continue;
    const int64_t step = ceil_div(rows, ceil_div(rows, most));
    for (int64_t begin = offsets_[g]; begin < offsets_[g + 1]; begin += step) {
      RowPiece piece{g, begin, std::min(step, offsets_[g + 1] - begin), true};
      for (int64_t k = 1; piece.consecutive && k < piece.rows; ++k)
        piece.consecutive = row_index_[begin + k] == row_index_[begin] + k;
      pieces.push_back(piece);
    }
  }
  return pieces;
}

void run_pieces(const Tensor& like, const std::vector<RowPiece>& pieces, int64_t row_bytes, int64_t row_operations,
                const RunPiece& run) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t all = 0, longest = 0;
  for (const RowPiece& piece : pieces) all += piece.rows, longest = std::max(longest, piece.rows);
  Needs needs(run, longest);
  const auto gathered = [&](const RowPiece& piece) {
    return piece.consecutive ? 0 : scratch_bytes(piece.rows * row_bytes) + kScratchAlign;
  };
  // Of large pieces the last may leave threads idle, so they may have to be shared among all threads.
  const int64_t large_rows = all / (8 * threads) + 1;
  std::vector<const RowPiece*> large, others;
  others.reserve(pieces.size());
  int64_t rest = 0;
  double one_by_one = 0;
  for (const RowPiece& piece : pieces) {
    const int64_t workers = threads > 1 && piece.rows >= large_rows ? needs.of(piece).workers : 1;
    (workers > 1 ? large : others).push_back(&piece);
    if (workers > 1)
      one_by_one += double(piece.rows) / double(workers);
    else
      rest += piece.rows;
  }
  const auto gathers_most =
      std::max_element(large.begin(), large.end(), [&](auto* a, auto* b) { return gathered(*a) < gathered(*b); });
  const bool little_memory = large.empty() || 8 * threads * gathered(**gathers_most) <= 3 * all * row_bytes;
  if (little_memory && double(side_by_side(large, all, threads)) <= 1.1 * (one_by_one + double(rest / threads))) {
    others.insert(others.end(), large.begin(), large.end());
    large.clear();
  }
  int64_t bytes = 0, serial_bytes = 0;
  for (const RowPiece* piece : large) bytes = std::max(bytes, needs.of(*piece).bytes + gathered(*piece));
  for (const RowPiece* piece : others)
    serial_bytes = std::max(serial_bytes, needs.of(*piece).serial_bytes + gathered(*piece));
  serial_bytes = scratch_bytes(serial_bytes);
  const int64_t operations = std::max<int64_t>(row_operations, 1);
  const Tasks tasks = shared_tasks(others, std::max(all / (32 * threads), kTaskOperations / operations) + 1,
                                   kTaskOperations / 4 / operations + 1);
  const int64_t count = others.empty() ? 0 : int64_t(tasks.ends.size());
  const WorkspaceSize shared(count, row_operations * all, serial_bytes, 0);
  bytes = std::max(bytes, count ? shared.workers * serial_bytes : 0);
  const Tensor memory = torch::stable::new_empty(like, {bytes + kScratchAlign}, ScalarType::Byte);
  char* start = reinterpret_cast<char*>(round_up(int64_t(memory.mutable_data_ptr()), kScratchAlign));

  const auto run_in = [&](const RowPiece& piece, char* at, bool serial) {
    WorkspaceSource source;
    source.start = at + (piece.consecutive ? 0 : scratch_bytes(piece.rows * row_bytes)), source.serial = serial;
    run(piece, source, at);
  };
  for (const RowPiece* piece : large) run_in(*piece, start, false);
  const auto task = [&](int64_t t, int64_t worker) {
    for (int64_t i = t ? tasks.ends[size_t(t - 1)] : 0; i < tasks.ends[size_t(t)]; ++i)
      run_in(*tasks.pieces[size_t(i)], start + worker * serial_bytes, true);
  };
  run_on_threads(
      count, shared.workers,
      [](void* closure, int64_t t, int64_t worker) { (*static_cast<decltype(task)*>(closure))(t, worker); },
      (void*)&task);
}

void gather_rows(const TensorRef& from, const int64_t* index, int64_t count, int64_t features, int64_t element_bytes,
                 char* to, bool serial) {
  const auto* data = static_cast<const char*>(from.data);
  for_rows(count, serial, [&](int64_t k) {
    const char* row = data + index[k] * from.row * element_bytes;
    char* out = to + k * features * element_bytes;
    if (from.col == 1 || features == 1) {
      std::memcpy(out, row, size_t(features * element_bytes));
    } else if (element_bytes == 8) {
      copy_strided<uint64_t>(row, from.col, features, out);
    } else if (element_bytes == 4) {
      copy_strided<uint32_t>(row, from.col, features, out);
    } else {
      copy_strided<uint16_t>(row, from.col, features, out);
    }
  });
}

void scatter_rows(const char* from, const int64_t* index, int64_t count, int64_t row_bytes, char* to, bool serial) {
  for_rows(count, serial,
           [&](int64_t k) { std::memcpy(to + index[k] * row_bytes, from + k * row_bytes, size_t(row_bytes)); });
}

}  // namespace mi_kernels
