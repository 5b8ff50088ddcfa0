// CallShape, f and f' side by side: one formula for numbers, on the host and on GPUs, and for vectors
// (csrc/cpu/activations.h). `Math` brings exp, tanh and erf. ops/activations.py has f'' too. At kinks and NaN they are
// PyTorch's.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/activation_kind.h"
#include "common/host_device.h"

namespace mi_kernels {

// The number type of a vector, or of a number.
template <class V>
struct LaneOf {
  using type = V;
};
template <class V>
  requires requires(V v) { v[0]; }
struct LaneOf<V> {
  using type = std::remove_cvref_t<decltype(V{}[0])>;
};
template <class V>
using Lane = typename LaneOf<V>::type;

template <class V>
MI_HOST_DEVICE V clamp(const V& t, Lane<V> low, Lane<V> high) {  // a NaN stays
  const V raised = t < low ? V{} + low : t;
  return raised > high ? V{} + high : raised;
}

struct ScalarMath {
  template <class T>
  static MI_HOST_DEVICE T exp(const T& t) {
    return std::exp(t);
  }
  template <class T>
  static MI_HOST_DEVICE T tanh(const T& t) {
    return std::tanh(t);
  }
  template <class T>
  static MI_HOST_DEVICE T erf(const T& t) {
    return std::erf(t);
  }
};

namespace elementwise {

struct Identity {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return t;
  }
  template <class V>
  static MI_HOST_DEVICE V first(const V&) {
    return V{} + Lane<V>(1);
  }
};

template <class Math>
struct Sigmoid {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return Lane<V>(1) / (Lane<V>(1) + Math::exp(V(-t)));
  }
  template <class V>
  static MI_HOST_DEVICE V first(const V& t) {
    const V s = value(t);
    return (Lane<V>(1) - s) * s;
  }
};

template <class Math>
struct Tanh {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return Math::tanh(t);
  }
  template <class V>
  static MI_HOST_DEVICE V first(const V& t) {
    const V h = Math::tanh(t);
    return Lane<V>(1) - h * h;
  }
};

struct Relu {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return t < Lane<V>(0) ? V{} : t;
  }
  template <class V>
  static MI_HOST_DEVICE V first(const V& t) {
    return t <= Lane<V>(0) ? V{} : V{} + Lane<V>(1);
  }
};

template <class Math>
struct Gelu {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return t * Lane<V>(0.5) * (Lane<V>(1) + Math::erf(V(t * Lane<V>(0.70710678118654752))));
  }
  template <class V>
  static MI_HOST_DEVICE V first(const V& t) {
    const V density = Lane<V>(0.39894228040143268) * Math::exp(V(Lane<V>(-0.5) * t * t));
    return Lane<V>(0.5) * (Lane<V>(1) + Math::erf(V(t * Lane<V>(0.70710678118654752)))) + t * density;
  }
};

template <class Math>
struct GeluTanh {
  template <class V>
  static MI_HOST_DEVICE V inner(const V& t) {
    return Math::tanh(V(Lane<V>(0.79788456080286536) * (t + Lane<V>(0.044715) * t * t * t)));
  }
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return Lane<V>(0.5) * t * (Lane<V>(1) + inner(t));
  }
  template <class V>
  static MI_HOST_DEVICE V first(const V& t) {
    const V h = inner(t), slope = Lane<V>(0.79788456080286536) * (Lane<V>(1) + Lane<V>(0.134145) * t * t);
    return Lane<V>(0.5) * (Lane<V>(1) + h) + Lane<V>(0.5) * t * (Lane<V>(1) - h * h) * slope;
  }
};

template <class Math>
struct Silu {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return t / (Lane<V>(1) + Math::exp(V(-t)));
  }
  template <class V>
  static MI_HOST_DEVICE V first(const V& t) {
    const V s = Sigmoid<Math>::value(t);
    return s * (Lane<V>(1) + t * (Lane<V>(1) - s));
  }
};

struct HardSigmoid {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return clamp(V(t + Lane<V>(3)), Lane<V>(0), Lane<V>(6)) / Lane<V>(6);
  }
  template <class V>
  static MI_HOST_DEVICE V first(const V& t) {
    const V inside = V{} + Lane<V>(1) / Lane<V>(6), below = t > Lane<V>(-3) ? inside : V{};
    return t < Lane<V>(3) ? below : V{};
  }
};

}  // namespace elementwise

// Calls f with the elementwise activation of that name, an object with value(t) and first(t).
template <class Math, class F>
MI_HOST_DEVICE void for_activation(Activation activation, F&& f) {
  using namespace elementwise;
  switch (activation) {
    case Activation::sigmoid: return f(Sigmoid<Math>{});
    case Activation::tanh: return f(Tanh<Math>{});
    case Activation::relu: return f(Relu{});
    case Activation::gelu: return f(Gelu<Math>{});
    case Activation::gelu_tanh: return f(GeluTanh<Math>{});
    case Activation::silu: return f(Silu<Math>{});
    case Activation::hardsigmoid: return f(HardSigmoid{});
    default: return f(Identity{});
  }
}

// Whether PyTorch selects where f' is 0, so that Inf does not become NaN there, rather than multiply.
MI_HOST_DEVICE constexpr bool selects(Activation activation) {
  return activation == Activation::relu || activation == Activation::hardsigmoid;
}

// f'(t) * direction.
template <class T>
MI_HOST_DEVICE T tangent(Activation activation, T t, T direction) {
  T slope = T(1);
  for_activation<ScalarMath>(activation, [&](auto act) { slope = act.first(t); });
  return selects(activation) && slope == T(0) ? T(0) : slope * direction;
}

}  // namespace mi_kernels
