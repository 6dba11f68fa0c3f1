// The row kernels for AVX2. Headers come before the switch, so that what they define stays code for any processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "row_kernels.h"

#pragma GCC target("avx2,fma,f16c")
#define ROW_SPACE avx2
#define ROW_BYTES 32
#include "row_kernels.inl"
#endif
