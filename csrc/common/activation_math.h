// Activations f and their derivatives f', as templates over scalars (on the host and on GPUs) and over vectors (on the
// CPU); `Math` has exp, tanh, erf and log1p. At kinks and for NaN they agree with PyTorch.
// mi_kernels/ops/activations.py has the same formulas, and f'' as well.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/activation_kind.h"
#include "common/host_device.h"

namespace mi_kernels {

// The element type of a vector; a scalar is its own.
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
MI_HOST_DEVICE V clamp(const V& t, Lane<V> low, Lane<V> high) {  // propagates NaN
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
  template <class T>
  static MI_HOST_DEVICE T log1p(const T& t) {
    return std::log1p(t);
  }
};

namespace elementwise {

struct Identity {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return t;
  }
  template <class V>
  static MI_HOST_DEVICE V derivative(const V&) {
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
  static MI_HOST_DEVICE V derivative(const V& t) {
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
  static MI_HOST_DEVICE V derivative(const V& t) {
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
  static MI_HOST_DEVICE V derivative(const V& t) {
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
  static MI_HOST_DEVICE V derivative(const V& t) {
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
  static MI_HOST_DEVICE V derivative(const V& t) {
    const V h = inner(t), slope = Lane<V>(0.79788456080286536) * (Lane<V>(1) + Lane<V>(0.134145) * t * t);
    return Lane<V>(0.5) * (Lane<V>(1) + h) + Lane<V>(0.5) * t * (Lane<V>(1) - h * h) * slope;
  }
};

template <class Math>
struct Silu {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return t * Sigmoid<Math>::value(t);  // f' has the same quotient
  }
  template <class V>
  static MI_HOST_DEVICE V derivative(const V& t) {
    const V s = Sigmoid<Math>::value(t);
    return s * (Lane<V>(1) + t * (Lane<V>(1) - s));
  }
};

// PyTorch's limit, beyond which softplus is the identity and tanh(softplus(t)) is 1.
template <class V>
inline constexpr Lane<V> kSoftplusLimit = 20;

template <class Math>
struct Mish {
  template <class V>
  struct Parts {  // tanh(softplus(t)) = n / (n + 2), and its derivative
    V tanh, slope;
  };
  template <class V>
  static MI_HOST_DEVICE Parts<V> parts(const V& t) {
    const V bounded = t > kSoftplusLimit<V> ? V{} + kSoftplusLimit<V> : t;
    const V e = Math::exp(bounded), n = e * (e + Lane<V>(2)), rest = Lane<V>(2) / (n + Lane<V>(2));
    const V h = n / (n + Lane<V>(2)), slope = rest * (Lane<V>(1) + h) * (e / (Lane<V>(1) + e));
    return {h, t > kSoftplusLimit<V> ? V{} : slope};
  }
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return t * parts(t).tanh;
  }
  template <class V>
  static MI_HOST_DEVICE V derivative(const V& t) {
    const auto [h, slope] = parts(t);
    return h + t * slope;
  }
};

template <class Math>
struct Softplus {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    const V positive = t < Lane<V>(0) ? V{} : t, size = t < Lane<V>(0) ? V(-t) : t;
    const V sum = positive + Math::log1p(V(Math::exp(V(-size))));
    return t > kSoftplusLimit<V> ? t : sum;
  }
  template <class V>
  static MI_HOST_DEVICE V derivative(const V& t) {
    return t > kSoftplusLimit<V> ? V{} + Lane<V>(1) : Sigmoid<Math>::value(t);
  }
};

// t sigmoid(1.702 t)
template <class Math>
struct QuickGelu {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return t / (Lane<V>(1) + Math::exp(V(Lane<V>(-1.702) * t)));
  }
  template <class V>
  static MI_HOST_DEVICE V derivative(const V& t) {
    const V s = Sigmoid<Math>::value(V(Lane<V>(1.702) * t));
    return s + Lane<V>(1.702) * s * (t * (Lane<V>(1) - s));  // 1.702 t may leave the range
  }
};

struct HardSwish {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return t * clamp(V(t + Lane<V>(3)), Lane<V>(0), Lane<V>(6)) / Lane<V>(6);
  }
  template <class V>
  static MI_HOST_DEVICE V derivative(const V& t) {
    const V inside = t / Lane<V>(3) + Lane<V>(0.5), from_below = t <= Lane<V>(-3) ? V{} : inside;
    return t >= Lane<V>(3) ? V{} + Lane<V>(1) : from_below;
  }
};

struct HardSigmoid {
  template <class V>
  static MI_HOST_DEVICE V value(const V& t) {
    return clamp(V(t + Lane<V>(3)), Lane<V>(0), Lane<V>(6)) / Lane<V>(6);
  }
  template <class V>
  static MI_HOST_DEVICE V derivative(const V& t) {
    const V inside = V{} + Lane<V>(1) / Lane<V>(6), below = t > Lane<V>(-3) ? inside : V{};
    return t < Lane<V>(3) ? below : V{};
  }
};

}  // namespace elementwise

// Calls f with the elementwise activation, an object with value(t) and derivative(t).
template <class Math, class F>
MI_HOST_DEVICE void for_activation(Activation activation, F&& f) {
  using namespace elementwise;
  switch (activation) {
    case Activation::sigmoid: return f(Sigmoid<Math>{});
    case Activation::tanh: return f(Tanh<Math>{});
    case Activation::relu: return f(Relu{});
    case Activation::gelu: return f(Gelu<Math>{});
    case Activation::gelu_tanh: return f(GeluTanh<Math>{});
    case Activation::quick_gelu: return f(QuickGelu<Math>{});
    case Activation::silu: return f(Silu<Math>{});
    case Activation::mish: return f(Mish<Math>{});
    case Activation::softplus: return f(Softplus<Math>{});
    case Activation::hardsigmoid: return f(HardSigmoid{});
    case Activation::hardswish: return f(HardSwish{});
    default: return f(Identity{});
  }
}

// Whether PyTorch's backward is a selection rather than a product, so that Inf times f' = 0 is 0 and not NaN.
MI_HOST_DEVICE constexpr bool backward_selects(Activation activation) {
  return activation == Activation::relu || activation == Activation::hardsigmoid || activation == Activation::hardswish;
}

// f'(t) * direction.
template <class T>
MI_HOST_DEVICE T tangent(Activation activation, T t, T direction) {
  T slope = T(1);
  for_activation<ScalarMath>(activation, [&](auto act) { slope = act.derivative(t); });
  return backward_selects(activation) && slope == T(0) ? T(0) : slope * direction;
}

}  // namespace mi_kernels
