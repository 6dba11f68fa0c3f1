// The row kernels for AVX-512. Headers come before the switch, so that what they define stays code for any processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "row_kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says both of its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#define ROW_SPACE avx512
#define ROW_BYTES 64
#include "row_kernels.inl"
#endif
