// The ops of csrc/cuda on memory of the CPU, for ctypes: the plans and kernels of the GPU, the machine of cuda_on_cpu.h.
#define URLVR_CUDA_ON_CPU
#include "../../csrc/cuda/policy_loss_from_logits.cuh"
#include "../../csrc/cuda/scale_rows.cuh"

namespace urlvr::cuda {

struct Arguments {  // as ctypes lays them out
  const void* logits;
  int64_t a, b, columns, outer_stride, inner_stride;
  const float* bias;
  const int64_t* ids;
  const bool* mask;
  const float* temperatures;
  const int64_t* crow;
  const int64_t* col;
  double temperature, softcap, scale;
  int64_t id_offset, total, flags;
  int64_t dtype;  // 0 fp32, 1 bf16, 2 fp16
};

struct Settings {  // of the device that the plans are made for, and of chance
  int64_t multiprocessors, clusters, slice_bytes, shared_bytes, seed;
};

static Rows rows_of(const Arguments& from) {
  Rows rows = {};
  rows.logits = from.logits;
  rows.inner = int(from.b), rows.outer_stride = from.outer_stride, rows.inner_stride = from.inner_stride;
  rows.count = int(from.a * from.b);
  rows.columns = int(from.columns);
  rows.bias = from.bias, rows.ids = from.ids, rows.mask = from.mask, rows.temperatures = from.temperatures;
  rows.crow = from.crow, rows.col = from.col;
  rows.set_numbers(from.temperature, from.softcap, from.scale);
  rows.id_offset = from.id_offset, rows.total = from.total, rows.flags = from.flags;
  return rows;
}

static Device device_of(const Settings& from) {
  machine::the().shuffle = from.seed != 0;
  machine::the().chance.seed(unsigned(from.seed));
  Device device;
  device.multiprocessors = int(from.multiprocessors);
  device.clusters = from.clusters;
  device.slice_bytes = int(from.slice_bytes);
  device.shared_bytes = int(from.shared_bytes);
  return device;
}

template <class Function>
static void with_kind(const Arguments& arguments, const Rows& rows, const Function& f) {
  auto with_dtype = [&](auto type) {
    if (rows.plain()) f(type, std::false_type());
    else f(type, std::true_type());
  };
  if (arguments.dtype == 0) with_dtype(float());
  else if (arguments.dtype == 1) with_dtype(Bf16());
  else with_dtype(Fp16());
}

// Scratch that begins as NaN, as new memory of the device may.
static std::vector<float> scratch_of(size_t bytes) { return std::vector<float>(bytes / 4 + 1, nan_<float>()); }

static LossNumbers<float> numbers_of(const double* numbers) {
  float as_float[LOSS_NUMBERS];
  for (int i = 0; i < LOSS_NUMBERS; ++i) as_float[i] = float(numbers[i]);
  LossNumbers<float> out;
  std::memcpy(&out, as_float, sizeof(out));
  return out;
}

static thread_local std::string message;
template <class Function>
static const char* guarded(const Function& f) {
  try {
    message.clear();
    f();
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

extern "C" const char* cuda_statistics(const Arguments* arguments, const Settings* settings, float* out) {
  return guarded([&] {
    const Rows rows = rows_of(*arguments);
    const Device device = device_of(*settings);
    with_kind(*arguments, rows, [&](auto type, auto general) {
      using T = decltype(type);
      constexpr bool GENERAL = decltype(general)::value;
      const StatisticsPlan plan = plan_statistics<T, GENERAL>(rows, device);
      std::vector<float> scratch = scratch_of(plan.scratch_bytes);
      launch_statistics<T, GENERAL>("statistics", rows, plan, scratch.data(), out, nullptr);
    });
  });
}

extern "C" const char* cuda_gradient(const Arguments* arguments, const Settings* settings, const float* stats, const float* upstream,
                                     int64_t given, void* out, int64_t outer_stride, int64_t inner_stride, float* bias_grad) {
  return guarded([&] {
    const Rows rows = rows_of(*arguments);
    const Device device = device_of(*settings);
    with_kind(*arguments, rows, [&](auto type, auto general) {
      using T = decltype(type);
      if (bias_grad) launch_bias_gradient<T>("bias_gradient", rows, stats, upstream, given, bias_grad, nullptr);
      const Out to = {out, rows.inner, outer_stride, inner_stride};
      launch_gradient<T, decltype(general)::value>("gradient", rows, device, stats, upstream, given, to, nullptr);
    });
  });
}

extern "C" const char* cuda_policy(const Arguments* arguments, const Settings* settings, const float* loss, int64_t present,
                                   int64_t kind, int64_t kl, int64_t correction, const double* numbers, float* stats, void* out,
                                   int64_t outer_stride, int64_t inner_stride, float* row_scale, int64_t* way) {
  return guarded([&] {
    const Rows rows = rows_of(*arguments);
    const Device device = device_of(*settings);
    const Loss of = {loss, present, int(kind), int(kl), int(correction), numbers_of(numbers), row_scale};
    with_kind(*arguments, rows, [&](auto type, auto general) {
      using T = decltype(type);
      constexpr bool GENERAL = decltype(general)::value;
      const PolicyPlan plan = plan_policy<T, GENERAL>(rows, device);
      *way = plan.way == IN_CLUSTER ? 10 * plan.cluster.blocks : plan.way;
      std::vector<float> scratch = scratch_of(plan.scratch_bytes);
      const Out to = {out, rows.inner, outer_stride, inner_stride};
      launch_policy<T, GENERAL>("policy", rows, of, plan, device, scratch.data(), stats, to, nullptr);
    });
  });
}

extern "C" const char* cuda_loss_rows(const Settings* settings, int64_t count, int64_t sequences, const float* advantages, const bool* mask,
                                      const int64_t* cu_seqlens, const float* old_logp, const float* ref_logp, const float* rollout_logp,
                                      const float* denominator, double number, const float* token_denominator, double token_number,
                                      int64_t weighing, float* lines, bool* live, float* counts) {
  return guarded([&] {
    device_of(*settings);
    RowsOfLoss rows = {};
    rows.count = int(count), rows.sequences = int(sequences);
    rows.mask = mask, rows.cu_seqlens = cu_seqlens, rows.advantages = advantages;
    rows.old_logp = old_logp, rows.ref_logp = ref_logp, rows.rollout_logp = rollout_logp;
    rows.denominator = denominator, rows.number = float(number), rows.weighing = weighing;
    rows.token_denominator = token_denominator, rows.token_number = float(token_number);
    std::vector<float> scratch = scratch_of(rows.scratch_bytes());
    launch_loss_rows("loss_rows", rows, scratch.data(), lines, live, counts, nullptr);
  });
}

extern "C" const char* cuda_join(const Settings* settings, int64_t count, int64_t sequences, const float* logp, const int64_t* cu_seqlens,
                                 const bool* which, int64_t present, int64_t kind, int64_t correction, int64_t product,
                                 const double* numbers, float* lines) {
  return guarded([&] {
    device_of(*settings);
    const RowsToJoin rows = {int(count), logp, cu_seqlens, int(sequences), which, product != 0};
    const Loss loss = {lines, present, int(kind), NO_KL, int(correction), numbers_of(numbers), nullptr};
    launch_join("join", rows, loss, lines, nullptr);
  });
}

extern "C" const char* cuda_objective(const Settings* settings, int64_t count, const float* logp, const float* entropy,
                                      const float* self_certainty, const float* lines, const bool* live, const float* counts,
                                      int64_t present, int64_t kind, int64_t kl, int64_t correction, const double* numbers, float* metrics,
                                      float* upstream) {
  return guarded([&] {
    device_of(*settings);
    const Loss loss = {lines, present, int(kind), int(kl), int(correction), numbers_of(numbers), nullptr};
    const RowValues rows = {int(count), logp, entropy, self_certainty, live};
    std::vector<float> partial = scratch_of(LOSS_SUMS * loss_blocks(count) * sizeof(float));
    launch_objective("objective", loss, rows, counts, partial.data(), metrics, upstream, nullptr);
  });
}

extern "C" const char* cuda_scale(const Arguments* arguments, const Settings* settings, const float* factor, const float* row_scale) {
  return guarded([&] {
    device_of(*settings);
    const Arguments& of = *arguments;  // its logits are the gradient
    const Out gradient = {const_cast<void*>(of.logits), int(of.b), of.outer_stride, of.inner_stride};
    const int count = int(of.a * of.b), columns = int(of.columns);
    if (of.dtype == 0) launch_scale<float>("scale", gradient, count, columns, factor, row_scale, nullptr);
    else if (of.dtype == 1) launch_scale<Bf16>("scale", gradient, count, columns, factor, row_scale, nullptr);
    else launch_scale<Fp16>("scale", gradient, count, columns, factor, row_scale, nullptr);
  });
}

}  // namespace urlvr::cuda
