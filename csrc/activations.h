// Activations of one number, f and f' side by side, for the host and for GPUs. csrc/cpu/activations.h has them on
// vectors, with its own exp, tanh and erf; ops/activations.py has f'' too. At kinks and NaN they are PyTorch's.
#pragma once

#include <cmath>

#include "activation.h"
#include "host_device.h"

namespace mi_kernels {

template <class T>
MI_HOST_DEVICE T sigmoid(T t) {
  return T(1) / (T(1) + std::exp(-t));
}

namespace elementwise {

struct Identity {
  template <class T>
  static MI_HOST_DEVICE T value(T t) {
    return t;
  }
  template <class T>
  static MI_HOST_DEVICE T first(T) {
    return T(1);
  }
};

struct Sigmoid {
  template <class T>
  static MI_HOST_DEVICE T value(T t) {
    return sigmoid(t);
  }
  template <class T>
  static MI_HOST_DEVICE T first(T t) {
    const T s = sigmoid(t);
    return (T(1) - s) * s;
  }
};

struct Tanh {
  template <class T>
  static MI_HOST_DEVICE T value(T t) {
    return std::tanh(t);
  }
  template <class T>
  static MI_HOST_DEVICE T first(T t) {
    const T h = std::tanh(t);
    return T(1) - h * h;
  }
};

struct Relu {
  template <class T>
  static MI_HOST_DEVICE T value(T t) {
    return t < T(0) ? T(0) : t;
  }
  template <class T>
  static MI_HOST_DEVICE T first(T t) {
    return t <= T(0) ? T(0) : T(1);
  }
};

struct Gelu {
  template <class T>
  static MI_HOST_DEVICE T value(T t) {
    return t * T(0.5) * (T(1) + std::erf(t * T(0.70710678118654752)));
  }
  template <class T>
  static MI_HOST_DEVICE T first(T t) {
    const T density = T(0.39894228040143268) * std::exp(T(-0.5) * t * t);
    return T(0.5) * (T(1) + std::erf(t * T(0.70710678118654752))) + t * density;
  }
};

struct GeluTanh {
  template <class T>
  static MI_HOST_DEVICE T inner(T t) {
    return std::tanh(T(0.79788456080286536) * (t + T(0.044715) * t * t * t));
  }
  template <class T>
  static MI_HOST_DEVICE T value(T t) {
    return T(0.5) * t * (T(1) + inner(t));
  }
  template <class T>
  static MI_HOST_DEVICE T first(T t) {
    const T h = inner(t), slope = T(0.79788456080286536) * (T(1) + T(0.134145) * t * t);
    return T(0.5) * (T(1) + h) + T(0.5) * t * (T(1) - h * h) * slope;
  }
};

struct Silu {
  template <class T>
  static MI_HOST_DEVICE T value(T t) {
    return t / (T(1) + std::exp(-t));
  }
  template <class T>
  static MI_HOST_DEVICE T first(T t) {
    const T s = sigmoid(t);
    return s * (T(1) + t * (T(1) - s));
  }
};

struct HardSigmoid {
  template <class T>
  static MI_HOST_DEVICE T value(T t) {
    const T raised = t + T(3) < T(0) ? T(0) : t + T(3);
    return (raised > T(6) ? T(6) : raised) / T(6);
  }
  template <class T>
  static MI_HOST_DEVICE T first(T t) {
    return t > T(-3) && t < T(3) ? T(1) / T(6) : T(0);
  }
};

}  // namespace elementwise

// Calls f with the elementwise activation of that name, an object with value(t) and first(t).
template <class F>
MI_HOST_DEVICE void for_activation(Activation activation, F&& f) {
  using namespace elementwise;
  switch (activation) {
    case Activation::sigmoid: return f(Sigmoid{});
    case Activation::tanh: return f(Tanh{});
    case Activation::relu: return f(Relu{});
    case Activation::gelu: return f(Gelu{});
    case Activation::gelu_tanh: return f(GeluTanh{});
    case Activation::silu: return f(Silu{});
    case Activation::hardsigmoid: return f(HardSigmoid{});
    default: return f(Identity{});
  }
}

// f'(t) * direction; where f is flat PyTorch selects and does not multiply, so that Inf does not become NaN there.
template <class T>
MI_HOST_DEVICE T tangent(Activation activation, T t, T direction) {
  T slope = T(1);
  for_activation(activation, [&](auto act) { slope = act.first(t); });
  const bool selects = activation == Activation::relu || activation == Activation::hardsigmoid;
  return selects && slope == T(0) ? T(0) : slope * direction;
}

}  // namespace mi_kernels
