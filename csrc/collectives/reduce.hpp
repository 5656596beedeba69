// Sums, extremes and products of the same elements of several ranks, in the order of the ranks.
#pragma once

#include <cstddef>

namespace collectives {

// The numbers stand in megallm/base/shared_memory.py too.
enum class Type { f32, f64, bf16, f16, i64, i32, i16, i8, u8, boolean };
enum class Op { sum, avg, max, min, product };

std::size_t width(Type type);

// out[i] = in[0][i] op in[1][i] op ...; also: where the result is written once more, or null. `out` may be one of the
// inputs. 16-bit floats are summed in fp32 and rounded once; the largest of NaN and a number is NaN.
void reduce(Type type, Op op, const void* const* in, int ranks, void* out, void* also, std::size_t count);

}  // namespace collectives
