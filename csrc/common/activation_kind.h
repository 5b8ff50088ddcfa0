// The activations of gates, by name. activation_math.h has their formulas.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

namespace mi_kernels {

enum class Activation : int {
  identity,
  sigmoid,
  tanh,
  relu,
  gelu,
  gelu_tanh,
  quick_gelu,
  silu,
  mish,
  softplus,
  hardsigmoid,
  hardswish,
  softmax
};

inline Activation activation_of(const std::string& name, const char* op, bool softmax,
                                const char* argument = "activation") {
  static constexpr const char* kNames[] = {"identity",    "sigmoid",    "tanh",   "relu", "gelu",
                                           "gelu_tanh",   "quick_gelu", "silu",   "mish", "softplus",
                                           "hardsigmoid", "hardswish",  "softmax"};
  for (int i = 0; i < int(Activation::softmax) + softmax; ++i)
    if (name == kNames[i]) return Activation(i);
  STD_TORCH_CHECK(false, op, ": ", argument, ": unknown or not elementwise: '", name, "'");
}

}  // namespace mi_kernels
