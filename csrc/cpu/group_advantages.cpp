// Rewards compared within their group, on the CPU.
//
// Sums are integers: a reward's height above the lowest of its group, as a fraction of a power of two, in units of 2^-62. Integers add up to
// the same in any order, so an advantage's bits depend on the rewards of its group and on nothing else: not on where they stand, and not on
// the kernel (`kernels/group_advantages.py` does the same arithmetic).
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <string>

#include "ops.h"

namespace urlvr::cpu {
namespace {

constexpr double LARGEST_REWARD = 1e150;  // as in reference.py

// Σ of numbers in [0, 1), each cut off at 2^-62. Halves of 31 bits leave room for 2^32 of them.
struct FixedSum {
  int64_t upper = 0, lower = 0;
  void add(double x) {
    const int64_t units = int64_t(x * 0x1p62);
    upper += units >> 31, lower += units & 0x7fffffff;
  }
  double value() const { return double(upper) * 0x1p-31 + double(lower) * 0x1p-62; }
};

struct Group {
  int64_t id = 0;
  double count = 0, lowest = infinity<double>(), highest = -infinity<double>();
  double unit = 1, inverse_unit = 1;  // a power of two above highest − lowest
  FixedSum heights, squares;          // in units, and units squared
  double mean = 0;                    // height, in units
  double deviation = 0;               // standard, unbiased

  void meet(double r) {
    count += 1;
    if (r < lowest) lowest = r;
    if (r > highest) highest = r;
  }
  void choose_unit() {
    int exponent;
    std::frexp(highest - lowest, &exponent);
    exponent = std::max(exponent, -1000);  // whose inverse still is a number
    unit = std::ldexp(1.0, exponent), inverse_unit = std::ldexp(1.0, -exponent);
  }
  double height(double r) const { return (r - lowest) * inverse_unit; }
  double centred(double r) const { return height(r) - mean; }
  bool constant() const { return lowest == highest; }  // by its extremes: a rounded mean would leave dust that a tiny deviation blows up
};

// From an id to the index of its group. Open addressing, at most half full; the keys are in the groups.
class Groups {
 public:
  explicit Groups(int64_t rows) {
    int bits = 1;
    while (int64_t(1) << bits < 2 * rows) ++bits;
    shift_ = 64 - bits;
    slots_.assign(size_t(1) << bits, -1);
  }
  int32_t index_of(int64_t id) {
    if (!groups.empty() && groups[last_].id == id) return last_;  // neighbours mostly share a prompt
    size_t slot = uint64_t(id) * 0x9e3779b97f4a7c15u >> shift_;
    while (slots_[slot] >= 0 && groups[slots_[slot]].id != id) slot = (slot + 1) & (slots_.size() - 1);
    if (slots_[slot] < 0) {
      slots_[slot] = int32_t(groups.size());
      groups.emplace_back().id = id;
    }
    return last_ = slots_[slot];
  }
  std::vector<Group> groups;

 private:
  std::vector<int32_t> slots_;
  int shift_;
  int32_t last_ = 0;
};

// Three walks: `each` calls a function of (reward, its group) for every rollout that counts.
template <class Each>
void measure(std::vector<Group>& groups, const Each& each) {
  each([](double r, Group& g) { g.meet(r); });
  for (Group& g : groups) g.choose_unit();
  each([](double r, Group& g) { g.heights.add(g.height(r)); });
  for (Group& g : groups) g.mean = g.heights.value() / g.count;
  each([](double r, Group& g) { g.squares.add(g.centred(r) * g.centred(r)); });
  for (Group& g : groups) g.deviation = std::sqrt(g.squares.value() / (g.count - 1)) * g.unit;
}

template <class T, class Id>
int64_t write_advantages(int64_t rows, const T* rewards, const Id* ids, const bool* mask, const std::string& scale, bool leave_one_out,
                         double eps, T* out) {
  Groups table(rows);
  std::vector<Group>& groups = table.groups;
  std::vector<int32_t> group_of(rows, -1);  // −1 of a masked rollout
  for (int64_t i = 0; i < rows; ++i) {
    if (mask && !mask[i]) continue;
    if (!(std::fabs(double(rewards[i])) <= LARGEST_REWARD)) return i;
    group_of[i] = table.index_of(int64_t(ids[i]));
  }
  measure(groups, [&](const auto& f) {
    for (int64_t i = 0; i < rows; ++i)
      if (group_of[i] >= 0) f(double(rewards[i]), groups[group_of[i]]);
  });
  std::vector<Group> batch(1);
  if (scale == "batch")
    measure(batch, [&](const auto& f) {
      for (int64_t i = 0; i < rows; ++i)
        if (group_of[i] >= 0) f(double(rewards[i]), batch[0]);
    });
  const bool by_group = scale == "group", by_batch = scale == "batch";
  for (int64_t i = 0; i < rows; ++i) {
    out[i] = T(0);
    if (group_of[i] < 0) continue;
    const Group& g = groups[group_of[i]];
    if (g.constant()) continue;
    double a = g.centred(double(rewards[i])) * g.unit;
    if (leave_one_out) a *= g.count / (g.count - 1);
    if (by_group) a /= g.deviation + eps;
    if (by_batch) a /= batch[0].deviation + eps;
    out[i] = T(a);
  }
  return -1;
}

}  // namespace

int64_t advantages(Tensor rewards, Tensor group_ids, MaybeTensor mask, std::string scale, std::string baseline, double eps, Tensor out) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(rewards.numel() <= INT32_MAX / 4, "urlvr_fast group_advantages: more rollouts than 2^29");
  const auto with_ids = [&](auto id, auto reward) {
    using T = decltype(reward);
    using Id = decltype(id);
    return write_advantages(rewards.numel(), static_cast<const T*>(rewards.data_ptr()), static_cast<const Id*>(group_ids.data_ptr()),
                            pointer<bool>(mask), scale, baseline == "leave_one_out", eps, static_cast<T*>(out.data_ptr()));
  };
  const auto with_rewards = [&](auto reward) {
    return group_ids.scalar_type() == ScalarType::Int ? with_ids(int32_t(), reward) : with_ids(int64_t(), reward);
  };
  switch (rewards.scalar_type()) {
    case ScalarType::BFloat16: return with_rewards(c10::BFloat16());
    case ScalarType::Half: return with_rewards(c10::Half());
    case ScalarType::Float: return with_rewards(float());
    case ScalarType::Double: return with_rewards(double());
    default: STD_TORCH_CHECK(false, "urlvr_fast group_advantages: rewards must be fp16, bf16, fp32 or fp64");
  }
}

}  // namespace urlvr::cpu
