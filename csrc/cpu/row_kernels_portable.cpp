// The row kernels for any processor: four floats at a time, which is what every 64-bit target has.
#include <cstring>
#include <type_traits>

#include "row_kernels.h"

#define ROW_SPACE portable
#define ROW_BYTES 16
#include "row_kernels.inl"
