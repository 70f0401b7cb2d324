// Logits that exist or are computed, with the same in fp64.
#pragma once

#include "cpu/scan.h"
#include "operands.h"

namespace pyqe::test {

struct Shape {
  std::int64_t n, dim, vocab;
};

// What turns products into logits; see cpu::Logits.
struct Transform {
  bool bias = false, row_scale = false, row_shift = false;
  float scale = 1, softcap = 0;
};

struct Row {
  std::vector<double> logits;
  double tolerance = 0;  // of a logit
};

template <class T>
struct Problem {
  Shape shape;
  Transform transform;
  Operand<T> hidden, weight, bias;
  std::vector<float> row_scale, row_shift;

  Problem(const Shape& of, const Transform& with, unsigned seed) : Problem(of, with, Generator(seed)) {}

  cpu::Logits logits() const {
    cpu::Logits from = {};
    from.hidden = hidden.matrix(), from.weight = weight.matrix();
    from.bias = transform.bias ? bias.elements.data() : nullptr;
    from.row_scale = transform.row_scale ? row_scale.data() : nullptr;
    from.row_shift = transform.row_shift ? row_shift.data() : nullptr;
    from.scale = transform.scale, from.softcap = transform.softcap;
    from.n = shape.n, from.dim = shape.dim, from.vocab = shape.vocab;
    from.dtype = dtype_of<T>();
    return from;
  }

  Row row(std::int64_t n) const {
    Row result;
    const auto at = static_cast<std::size_t>(n);
    const double factor = transform.scale * (transform.row_scale ? row_scale[at] : 1.0);
    for (std::int64_t v = 0; v < shape.vocab; ++v) {
      double sum = 0, magnitude = 0;
      for (std::int64_t d = 0; d < shape.dim; ++d) {
        const double term = hidden.at(n, d) * weight.at(v, d);
        sum += term, magnitude += std::fabs(term);
      }
      double z = factor * sum;
      if (transform.bias) z += transform.scale * bias.at(0, v);
      if (transform.row_shift) z += row_shift[at];
      double tolerance = kFloatEps * (4 * std::fabs(factor) * magnitude + 4 * std::fabs(z) + 4);
      if (transform.softcap != 0) {
        z = transform.softcap * std::tanh(z / transform.softcap);
        tolerance += 2e-7 * transform.softcap;
      }
      result.logits.push_back(z);
      result.tolerance = std::fmax(result.tolerance, tolerance);
    }
    return result;
  }

 private:
  Problem(const Shape& of, const Transform& with, Generator random)
      : shape(of),
        transform(with),
        hidden(random_operand<T>(random, of.n, of.dim)),
        weight(random_operand<T>(random, of.vocab, of.dim, 2 / std::sqrt(1.0 + static_cast<double>(of.dim)))),
        bias(random_operand<T>(random, 1, of.vocab)),
        row_scale(random_operand<float>(random, 1, of.n).elements),
        row_shift(random_operand<float>(random, 1, of.n).elements) {}
};

template <class T>
struct ExistingProblem {
  Shape shape;
  Operand<T> operand;

  ExistingProblem(const Shape& of, unsigned seed) : shape(of), operand(of.n, of.vocab) {
    Generator random(seed);
    operand = random_operand<T>(random, of.n, of.vocab, 2);
  }

  cpu::Logits logits() const {
    cpu::Logits from = {};
    from.logits = operand.matrix();
    from.n = shape.n, from.vocab = shape.vocab;
    from.dtype = dtype_of<T>();
    return from;
  }

  Row row(std::int64_t n) const {
    Row result;
    for (std::int64_t v = 0; v < shape.vocab; ++v) result.logits.push_back(operand.at(n, v));
    result.tolerance = 0;
    return result;
  }
};

}  // namespace pyqe::test
