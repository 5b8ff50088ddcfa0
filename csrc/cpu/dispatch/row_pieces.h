// Rows in groups of unequal length, in any order, as pieces that are one call each: how they share threads and memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "common/tensor_ref.h"
#include "cpu/dispatch/workspace.h"

namespace mi_kernels {

// A contiguous int64 tensor of one dimension, on the CPU as `like` is.
Tensor int64_vector(const char* op, const char* name, const Tensor&, const Tensor& like,
                    std::optional<int64_t> size = {});

// Rows row_index[first : first + rows], all of one group.
struct RowPiece {
  int64_t group, first, rows;
  bool consecutive;  // in memory
};

// The rows of group g are row_index[offsets[g] : offsets[g + 1]]; every row is in one group.
class __attribute__((visibility("hidden"))) RowGroups {
 public:
  RowGroups(const char* op, const Tensor& row_index, const Tensor& offsets, const Tensor& like, int64_t rows);

  int64_t groups() const { return groups_; }
  int64_t rows() const { return rows_; }
  const int64_t* row_index() const { return row_index_; }
  bool empty(int64_t group) const { return offsets_[group] == offsets_[group + 1]; }
  // Groups with more than `most` rows are several pieces of about one length.
  std::vector<RowPiece> pieces(int64_t most) const;

 private:
  Tensor index_tensor_, offsets_tensor_;
  const int64_t *row_index_, *offsets_;
  int64_t rows_, groups_;
};

// What one piece has to do. `memory` measures it or runs it; `rows` is memory for its rows, one after the other, unless
// they are read and written in place.
using RunPiece = std::function<void(const RowPiece&, const WorkspaceSource& memory, char* rows)>;

// Runs all pieces. Many are shared among the threads; those that are a large part of all are shared among all threads,
// one after the other. `row_bytes`: memory for one row that is not in its place; `row_operations`: its arithmetic.
void run_pieces(const Tensor& like, const std::vector<RowPiece>& pieces, int64_t row_bytes, int64_t row_operations,
                const RunPiece& run);

// to[k] = from[index[k]], rows of `features` elements, and the reverse for contiguous rows.
void gather_rows(const TensorRef& from, const int64_t* index, int64_t count, int64_t features, int64_t element_bytes,
                 char* to, bool serial);
void scatter_rows(const char* from, const int64_t* index, int64_t count, int64_t row_bytes, char* to, bool serial);

}  // namespace mi_kernels
