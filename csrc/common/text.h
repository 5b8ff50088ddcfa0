// Text arguments of registered operations.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string>

namespace mi_kernels {

// A std::string that a kernel takes by value. PyTorch's own conversion to std::string (up to 2.13 at least) leaks a
// copy at every call; left on the heap between results, those copies keep their memory from being used again, so that
// each result is on fresh pages.
struct Text : std::string {
  using std::string::string;
};

}  // namespace mi_kernels

template <>
struct torch::stable::detail::ToImpl<mi_kernels::Text> {
  static mi_kernels::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    mi_kernels::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
