// A string argument of a registered operation.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace mi_kernels {

// torch's own conversion to std::string (2.10 to 2.13) copies the string to the heap and forgets it there. The 48 bytes
// are the smaller loss: where they lie in front of a result, glibc cannot merge the result's memory with its
// neighbours when it is freed, no later result fits, and every call takes fresh pages.
struct StringArgument : std::string {};

}  // namespace mi_kernels

template <>
struct torch::stable::detail::ToImpl<mi_kernels::StringArgument> {
  static mi_kernels::StringArgument call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    const char* data = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    mi_kernels::StringArgument found{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return found;
  }
};
