// A policy loss, as the ops of the CPU are given it.
#pragma once

#include <cstring>
#include <vector>

#include "rows.h"

namespace urlvr::cpu {

template <class R>
struct Loss {
  const R* lines;  // (LOSS_LINES, N)
  int64_t present;
  int kind, kl, correction;
  LossNumbers<double> numbers;
};

inline LossNumbers<double> loss_numbers(const std::vector<double>& numbers) {
  STD_TORCH_CHECK(numbers.size() == LOSS_NUMBERS, "urlvr_fast: a policy loss has ", LOSS_NUMBERS, " numbers, not ", numbers.size());
  LossNumbers<double> out;
  std::memcpy(&out, numbers.data(), sizeof(out));
  return out;
}

}  // namespace urlvr::cpu
