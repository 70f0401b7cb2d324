// Fills in the table of one instruction set.
#pragma once

#include "cpu/inverse_softmax_kernels.h"
#include "cpu/kernels.h"
#include "cpu/scan_kernels.h"
#include "cpu/temperature_kernels.h"
#include "cpu/token_logits_kernels.h"
#include "cpu/vocab_bce_kernels.h"

namespace pyqe::cpu {
namespace {

// constexpr: the table is data in the library, so loading the library runs no code of this instruction set.
template <class Isa>
constexpr Kernels kernel_table() {
  return {
      [](const TokenLogitsForward& args, std::int64_t begin, std::int64_t end) {
        with_element_type(args.dtype, [&](auto element) {
          token_logits_forward<Isa, decltype(element)>(args, begin, end);
        });
      },
      [](const TokenLogitsBackwardHidden& args, std::int64_t begin, std::int64_t end) {
        with_element_type(args.dtype, [&](auto element) {
          token_logits_backward_hidden<Isa, decltype(element)>(args, begin, end);
        });
      },
      [](const TokenLogitsBackwardWeight& args, std::int64_t begin, std::int64_t end) {
        with_element_type(args.dtype, [&](auto element) {
          token_logits_backward_weight<Isa, decltype(element)>(args, begin, end);
        });
      },
      panel_shape<Isa>,
      pack_rows<Isa>,
      scan_segments<Isa>,
      tile_logits<Isa>,
      scaled_exp<Isa>,
      vocab_bce_shape<Isa>,
      [](const VocabBcePass& pass, VocabBceWork work, std::int64_t group, std::int64_t item) {
        with_element_type(pass.args->logits.dtype,
                          [&](auto element) { vocab_bce<Isa, decltype(element)>(pass, work, group, item); });
      },
      inverse_softmax<Isa>,
      [](const TemperatureNll& args, std::int64_t begin, std::int64_t end) {
        TemperatureSums sums = {};
        with_element_type(args.dtype, [&](auto element) {
          sums = temperature_nll<Isa, decltype(element)>(args, begin, end);
        });
        return sums;
      },
  };
}

}  // namespace
}  // namespace pyqe::cpu
