// Which instruction set the CPU kernels run on: the best that the processor has, chosen when the library is loaded.
#include "instruction_set.h"

#include "rows.h"

namespace urlvr::cpu {

enum Set { PORTABLE, AVX2, AVX512, SETS };
static const char* const names[SETS] = {"portable", "avx2", "avx512"};

static bool has(Set set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (set == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (set == AVX512)
    return has(AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return set == PORTABLE;
}

static Set best() { return has(AVX512) ? AVX512 : has(AVX2) ? AVX2 : PORTABLE; }
static Set in_use = best();

std::string use_instruction_set(std::string name) {
  for (int set = 0; set < SETS; ++set)
    if (name == names[set]) {
      STD_TORCH_CHECK(has(Set(set)), "urlvr_fast: this processor has no ", name);
      in_use = Set(set);
      return name;
    }
  STD_TORCH_CHECK(name.empty(), "urlvr_fast: no instruction set is called ", name, "; there are portable, avx2 and avx512");
  return names[in_use];
}

#if defined(__x86_64__)
#define TABLE(T, R, name)                                       \
  template <> const RowKernels<T, R>& row_kernels<T, R>() {     \
    return in_use == AVX512 ? avx512::name : in_use == AVX2 ? avx2::name : portable::name; \
  }
#else
#define TABLE(T, R, name) \
  template <> const RowKernels<T, R>& row_kernels<T, R>() { return portable::name; }
#endif
TABLE(bf16, float, kernels_bf16)
TABLE(fp16, float, kernels_fp16)
TABLE(float, float, kernels_float)
TABLE(double, double, kernels_double)

}  // namespace urlvr::cpu
