// The activations of gates, by name. activation_math.h has their formulas.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

namespace mi_kernels {

enum class Activation : int { identity, sigmoid, tanh, relu, gelu, gelu_tanh, silu, hardsigmoid, softmax };

inline Activation activation_of(const std::string& name, const char* op, bool softmax) {
  static constexpr const char* kNames[] = {"identity",  "sigmoid", "tanh",        "relu",   "gelu",
                                           "gelu_tanh", "silu",    "hardsigmoid", "softmax"};
  for (int i = 0; i < (softmax ? 9 : 8); ++i)
    if (name == kNames[i]) return Activation(i);
  STD_TORCH_CHECK(false, op, ": activation: unknown or not elementwise: '", name, "'");
}

}  // namespace mi_kernels
