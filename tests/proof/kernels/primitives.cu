// One small kernel for each thing that a kernel can ask of the device, and for each pattern of memory traffic.
// test_emulator.py says what each must give; a line that it looks up in a trace has a comment TRACED with a name.
#include <type_traits>

#include "common/philox.h"
#include "common/vec.cuh"
#include "proof_kernel.h"

namespace fastlm {
namespace proof {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Threads and blocks -------------------------------------------------------------------------------------------------

// [blocks, threads, 12]: threadIdx, blockIdx, blockDim and gridDim as a thread sees them.
PROOF_KERNEL(indices) {
  const unsigned seen[12] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
                             blockDim.x,  blockDim.y,  blockDim.z,  gridDim.x,  gridDim.y,  gridDim.z};
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  int* const all = args.tensor<int>(0) + (block * threads + thread) * 12;
  for (int i = 0; i < 12; ++i) all[i] = static_cast<int>(seen[i]);
}

// A counter, and for each of 3 turns, block and warp the count when its first lane came by: [3, blocks, warps].
PROOF_KERNEL(order) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  for (int turn = 0; turn < 3; ++turn) {
    if (threadIdx.x % 32 == 0) {
      args.tensor<int>(1)[(turn * gridDim.x + blockIdx.x) * warps + warp] = atomicAdd(args.tensor<int>(0), 1);
    }
    __syncwarp();
  }
}

// Shuffles and votes -------------------------------------------------------------------------------------------------

// x [32], operand [32] -> [4, 32]: idx, up, down, xor. Number: width.
template <typename T>
__device__ void shuffle_all_ways(const Args& args) {
  const int lane = threadIdx.x, operand = args.tensor<int>(1)[lane], width = static_cast<int>(args.numbers[0]);
  const T x = args.tensor<T>(0)[lane];
  T* const y = args.tensor<T>(2) + lane;
  y[0] = __shfl_sync(kAllLanes, x, operand, width);
  y[32] = __shfl_up_sync(kAllLanes, x, operand, width);
  y[64] = __shfl_down_sync(kAllLanes, x, operand, width);
  y[96] = __shfl_xor_sync(kAllLanes, x, operand, width);
}
PROOF_KERNEL(shuffle_float) { shuffle_all_ways<float>(args); }
PROOF_KERNEL(shuffle_int) { shuffle_all_ways<int>(args); }
PROOF_KERNEL(shuffle_unsigned) { shuffle_all_ways<unsigned>(args); }
PROOF_KERNEL(shuffle_double) { shuffle_all_ways<double>(args); }
PROOF_KERNEL(shuffle_long) { shuffle_all_ways<long long>(args); }

// x [32] -> [32]: odd and even lanes pass theirs on, each among themselves, to the second lane after.
PROOF_KERNEL(shuffle_in_branches) {
  const int lane = threadIdx.x;
  const int x = args.tensor<int>(0)[lane];
  int* const y = args.tensor<int>(1);
  if (lane % 2 == 1) {
    y[lane] = __shfl_sync(0xAAAAAAAAu, x, lane - 2);
  } else {
    y[lane] = __shfl_sync(0x55555555u, x, lane - 2) + 1000;
  }
}

// predicate [32], x [32] -> [4, 32]: ballot, any, all, match_any.
PROOF_KERNEL(votes) {
  const int lane = threadIdx.x, predicate = args.tensor<int>(0)[lane];
  unsigned* const y = args.tensor<unsigned>(2) + lane;
  y[0] = __ballot_sync(kAllLanes, predicate);
  y[32] = __any_sync(kAllLanes, predicate);
  y[64] = __all_sync(kAllLanes, predicate);
  y[96] = __match_any_sync(kAllLanes, args.tensor<int>(1)[lane]);
}

// The same among the upper 16 lanes, without the lower ones.
PROOF_KERNEL(votes_in_a_branch) {
  const int lane = threadIdx.x, predicate = args.tensor<int>(0)[lane];
  if (lane < 16) return;
  const unsigned mask = 0xFFFF0000u;
  unsigned* const y = args.tensor<unsigned>(2) + lane;
  y[0] = __ballot_sync(mask, predicate);
  y[32] = __any_sync(mask, predicate);
  y[64] = __all_sync(mask, predicate);
  y[96] = __match_any_sync(mask, args.tensor<int>(1)[lane]);
}

// Barriers -----------------------------------------------------------------------------------------------------------

// x [threads] -> [threads], reversed in each warp twice, through shared memory.
PROOF_KERNEL(warp_exchange) {
  FASTLM_SHARED(float, tile, [64]);
  const int thread = threadIdx.x, opposite = thread ^ 31;
  tile[thread] = args.tensor<float>(0)[thread];
  __syncwarp();
  const float once = tile[opposite];
  __syncwarp();
  tile[thread] = once + 1.0f;
  __syncwarp();
  args.tensor<float>(1)[thread] = tile[opposite];
}

// x [32] -> [32]: each half of a warp reverses its own, in branches of their own.
PROOF_KERNEL(half_warp_exchange) {
  FASTLM_SHARED(float, tile, [32]);
  const int lane = threadIdx.x;
  tile[lane] = args.tensor<float>(0)[lane];
  if (lane < 16) {
    __syncwarp(0x0000FFFFu);
    args.tensor<float>(1)[lane] = tile[15 - lane];
  } else {
    __syncwarp(0xFFFF0000u);
    args.tensor<float>(1)[lane] = -tile[47 - lane];
  }
}

// x [threads] -> [threads], reversed in the block.
PROOF_KERNEL(block_exchange) {
  FASTLM_SHARED(float, tile, [1024]);
  tile[threadIdx.x] = args.tensor<float>(0)[threadIdx.x];
  __syncthreads();
  args.tensor<float>(1)[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

// x [128] -> [128], reversed in each half of the block, whose halves have a barrier each and never meet.
PROOF_KERNEL(two_barriers) {
  FASTLM_SHARED(float, tile, [128]);
  const int thread = threadIdx.x, half = thread / 64;
  for (int turn = 0; turn <= half; ++turn) {
    tile[thread] = args.tensor<float>(0)[thread];
    barrier_sync(1 + half, 64);
    args.tensor<float>(1)[thread] = tile[half * 64 + 63 - thread % 64];
    barrier_sync(1 + half, 64);
  }
}

// x [steps, 64] -> [steps, 64], each reversed: two warps write to two buffers in turn and two others read them. Neither
// waits where it need not. Number: steps.
PROOF_KERNEL(producer_consumer) {
  FASTLM_SHARED(float, tile, [2][64]);
  const int steps = static_cast<int>(args.numbers[0]), thread = threadIdx.x % 64;
  const int full = 1, empty = 3;
  if (threadIdx.x < 64) {
    for (int step = 0; step < steps; ++step) {
      if (step >= 2) barrier_sync(empty + step % 2, 128);
      tile[step % 2][thread] = args.tensor<float>(0)[step * 64 + thread];
      barrier_arrive(full + step % 2, 128);
    }
  } else {
    for (int step = 0; step < steps; ++step) {
      barrier_sync(full + step % 2, 128);
      args.tensor<float>(1)[step * 64 + thread] = tile[step % 2][63 - thread];
      if (step + 2 < steps) barrier_arrive(empty + step % 2, 128);
    }
  }
}

// Shared memory ------------------------------------------------------------------------------------------------------

// x [blocks, 37] -> the same, by way of two arrays; [blocks, 3]: what their addresses leave over by their alignment,
// and whether they overlap.
PROOF_KERNEL(static_shared) {
  FASTLM_SHARED(float, first, [33]);
  FASTLM_SHARED(double, second, [4]);
  const float* const x = args.tensor<float>(0) + blockIdx.x * 37;
  float* const y = args.tensor<float>(1) + blockIdx.x * 37;
  int* const addresses = args.tensor<int>(2) + blockIdx.x * 3;
  const int thread = threadIdx.x;
  if (thread < 33) first[thread] = x[thread];
  if (thread < 4) second[thread] = x[33 + thread];
  __syncthreads();
  if (thread < 33) y[thread] = first[thread];
  if (thread < 4) y[33 + thread] = static_cast<float>(second[thread]);
  if (thread == 0) {
    const uintptr_t one = reinterpret_cast<uintptr_t>(first), two = reinterpret_cast<uintptr_t>(second);
    addresses[0] = static_cast<int>(one % sizeof(float));
    addresses[1] = static_cast<int>(two % sizeof(double));
    addresses[2] = one < two + sizeof(second) && two < one + sizeof(first);
  }
}

// x [blocks, n] -> the same, reversed; [blocks]: what the address leaves over by 128. Number: n.
PROOF_KERNEL(dynamic_shared) {
  FASTLM_DYNAMIC_SHARED(float, tile);
  const int n = static_cast<int>(args.numbers[0]), thread = threadIdx.x;
  for (int i = thread; i < n; i += blockDim.x) tile[i] = args.tensor<float>(0)[blockIdx.x * n + i];
  __syncthreads();
  for (int i = thread; i < n; i += blockDim.x) args.tensor<float>(1)[blockIdx.x * n + i] = tile[n - 1 - i];
  if (thread == 0) args.tensor<int>(2)[blockIdx.x] = static_cast<int>(reinterpret_cast<uintptr_t>(tile) % 128);
}

// Atomics ------------------------------------------------------------------------------------------------------------

// x [threads], cells [5] -> cells and what they were [5, threads]: add, max, min, exchange, and put in place of zero.
template <typename T>
__device__ void all_atomics(const Args& args, T* cells) {
  const T x = args.tensor<T>(0)[threadIdx.x];
  T* const old = args.tensor<T>(2) + threadIdx.x;
  const int n = blockDim.x;
  old[0] = atomicAdd(cells, x);
  if constexpr (std::is_integral_v<T>) {
    old[n] = atomicMax(cells + 1, x);
    old[2 * n] = atomicMin(cells + 2, x);
    old[4 * n] = atomicCAS(cells + 4, T{0}, x);
  }
  if constexpr (!std::is_same_v<T, double>) old[3 * n] = atomicExch(cells + 3, x);
}

template <typename T>
__device__ void shared_atomics(const Args& args) {
  FASTLM_SHARED(T, cells, [5]);
  T* const given = args.tensor<T>(1);
  if (threadIdx.x < 5) cells[threadIdx.x] = given[threadIdx.x];
  __syncthreads();
  all_atomics<T>(args, cells);
  __syncthreads();
  if (threadIdx.x < 5) given[threadIdx.x] = cells[threadIdx.x];
}

PROOF_KERNEL(atomics_int) { all_atomics<int>(args, args.tensor<int>(1)); }
PROOF_KERNEL(atomics_unsigned) { all_atomics<unsigned>(args, args.tensor<unsigned>(1)); }
PROOF_KERNEL(atomics_long) { all_atomics<unsigned long long>(args, args.tensor<unsigned long long>(1)); }
PROOF_KERNEL(atomics_float) { all_atomics<float>(args, args.tensor<float>(1)); }
PROOF_KERNEL(atomics_double) { all_atomics<double>(args, args.tensor<double>(1)); }
PROOF_KERNEL(shared_atomics_int) { shared_atomics<int>(args); }
PROOF_KERNEL(shared_atomics_unsigned) { shared_atomics<unsigned>(args); }
PROOF_KERNEL(shared_atomics_long) { shared_atomics<unsigned long long>(args); }
PROOF_KERNEL(shared_atomics_float) { shared_atomics<float>(args); }
PROOF_KERNEL(shared_atomics_double) { shared_atomics<double>(args); }

// x [blocks * threads], cell [1] -> cell: the largest x, by compare and swap.
PROOF_KERNEL(atomic_loop) {
  int* const cell = args.tensor<int>(1);
  const float x = args.tensor<float>(0)[blockIdx.x * blockDim.x + threadIdx.x];
  int seen = atomicCAS(cell, 0, 0);
  while (__int_as_float(seen) < x) {
    const int before = atomicCAS(cell, seen, __float_as_int(x));
    if (before == seen) break;
    seen = before;
  }
}

// Copies from global to shared memory --------------------------------------------------------------------------------

// x [32 * kBytes] in bytes, bytes [32] -> [32 * kBytes]. A lane whose bytes are 0 has an address outside x.
template <int kBytes>
__device__ void copy_bytes(const Args& args) {
  FASTLM_SHARED(uint4, tile, [32]);
  const int lane = threadIdx.x, bytes = args.tensor<int>(1)[lane];
  unsigned char* const here = reinterpret_cast<unsigned char*>(tile) + lane * kBytes;
  const unsigned char* const x = args.tensor<unsigned char>(0) + (bytes == 0 ? 32 : lane) * kBytes;
  cp_async<kBytes>(here, x, bytes);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < kBytes; ++i) args.tensor<unsigned char>(2)[lane * kBytes + i] = here[i];
}
PROOF_KERNEL(copy_4_bytes) { copy_bytes<4>(args); }
PROOF_KERNEL(copy_8_bytes) { copy_bytes<8>(args); }
PROOF_KERNEL(copy_16_bytes) { copy_bytes<16>(args); }

// x [4, 32] -> [4, 32] in four groups, the third one empty, the last one of two copies.
PROOF_KERNEL(copy_groups) {
  FASTLM_SHARED(float, tile, [4][32]);
  const int lane = threadIdx.x;
  const float* const x = args.tensor<float>(0) + lane;
  float* const y = args.tensor<float>(1) + lane;
  cp_async<4>(&tile[0][lane], x);
  cp_async_commit();
  cp_async<4>(&tile[1][lane], x + 32);
  cp_async_commit();
  cp_async_commit();
  cp_async<4>(&tile[2][lane], x + 64);
  cp_async<4>(&tile[3][lane], x + 96);
  cp_async_commit();
  cp_async_wait<3>();
  y[0] = tile[0][lane];
  cp_async_wait<2>();
  y[32] = tile[1][lane];
  cp_async_wait<0>();
  y[64] = tile[2][lane];
  y[96] = tile[3][lane];
}

// x [threads, 4] -> [threads, 4], reversed in the block: a copy is seen by others after its wait and a barrier.
PROOF_KERNEL(copy_for_others) {
  FASTLM_SHARED(float4, tile, [128]);
  cp_async<16>(&tile[threadIdx.x], args.tensor<float4>(0) + threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  args.tensor<float4>(1)[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

// Fragments ----------------------------------------------------------------------------------------------------------

// Matrices [32, 8] of 16 bits, rows [32] -> registers [32, N]: lane n gives the address of row rows[n].
template <int N, bool kTrans>
__device__ void load_matrices(const Args& args) {
  FASTLM_SHARED(uint4, tile, [32]);
  const int lane = threadIdx.x;
  tile[lane] = args.tensor<uint4>(0)[lane];
  __syncwarp();
  const uint4* const row = tile + args.tensor<int>(1)[lane];
  uint32_t d[N];
  if constexpr (kTrans) {
    ldmatrix_trans<N>(d, row);
  } else {
    ldmatrix<N>(d, row);
  }
  for (int n = 0; n < N; ++n) args.tensor<uint32_t>(2)[lane * N + n] = d[n];
}
PROOF_KERNEL(ldmatrix_x1) { load_matrices<1, false>(args); }
PROOF_KERNEL(ldmatrix_x2) { load_matrices<2, false>(args); }
PROOF_KERNEL(ldmatrix_x4) { load_matrices<4, false>(args); }
PROOF_KERNEL(ldmatrix_x1_trans) { load_matrices<1, true>(args); }
PROOF_KERNEL(ldmatrix_x2_trans) { load_matrices<2, true>(args); }
PROOF_KERNEL(ldmatrix_x4_trans) { load_matrices<4, true>(args); }

// Registers of a [32, 4], b [32, 2], d [32, 4] -> d.
template <typename Multiply>
__device__ void multiply_fragments(const Args& args, const Multiply& multiply) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = args.tensor<uint32_t>(0)[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = args.tensor<uint32_t>(1)[lane * 2 + i];
  for (int i = 0; i < 4; ++i) d[i] = args.tensor<float>(2)[lane * 4 + i];
  multiply(d, a, b);
  for (int i = 0; i < 4; ++i) args.tensor<float>(2)[lane * 4 + i] = d[i];
}
PROOF_KERNEL(mma_bf16) {
  multiply_fragments(args, [](auto& d, const auto& a, const auto& b) { mma_16816<__nv_bfloat16>(d, a, b); });
}
PROOF_KERNEL(mma_fp16) {
  multiply_fragments(args, [](auto& d, const auto& a, const auto& b) { mma_16816<__half>(d, a, b); });
}
PROOF_KERNEL(mma_tf32) {
  multiply_fragments(args, [](auto& d, const auto& a, const auto& b) { mma_1688_tf32(d, a, b); });
}

// Arithmetic ---------------------------------------------------------------------------------------------------------

// x [n], z [n] -> [16, n].
PROOF_KERNEL(float_intrinsics) {
  const int n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  const float x = __ldg(args.tensor<float>(0) + i), z = __ldg(args.tensor<float>(1) + i);
  const float results[] = {__expf(x),
                           exp2_approx(x),
                           __logf(x),
                           __log2f(x),
                           __fdividef(x, z),
                           __frcp_rn(x),
                           __fsqrt_rn(x),
                           rsqrtf(x),
                           __fmul_rn(x, z),
                           __fadd_rn(x, z),
                           __fmaf_rn(x, z, x),
                           __fadd_rn(__fmul_rn(x, z), x),
                           fminf(x, z),
                           fmaxf(x, z),
                           __int_as_float(__float_as_int(x) ^ 0x40000000),
                           __uint_as_float(__float_as_uint(x) ^ 0x80000000u)};
  for (int k = 0; k < 16; ++k) args.tensor<float>(2)[k * n + i] = results[k];
}

// a [n], b [n] -> [13, n], in 64 bits.
PROOF_KERNEL(int_intrinsics) {
  const int n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  const int a = args.tensor<int>(0)[i], b = args.tensor<int>(1)[i];
  const unsigned ua = static_cast<unsigned>(a), ub = static_cast<unsigned>(b);
  const long long wide = static_cast<long long>(static_cast<unsigned long long>(ua) << 32 | ub);
  const long long results[] = {__popc(ua),
                               __clz(a),
                               __ffs(a),
                               __brev(ua),
                               __umulhi(ua, ub),
                               __popcll(static_cast<unsigned long long>(wide)),
                               __clzll(wide),
                               __ffsll(wide),
                               min(a, b),
                               max(a, b),
                               min(ua, ub),
                               max(ua, ub),
                               max(wide, static_cast<long long>(a))};
  for (int k = 0; k < 13; ++k) args.tensor<long long>(2)[k * n + i] = results[k];
}

// Memory traffic -----------------------------------------------------------------------------------------------------

// x -> y, N neighbours to a thread, doubled. Number: N.
template <typename T, int N>
__device__ void double_vectors(const Args& args) {
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  float x[N];
  load<N>(args.tensor<T>(0) + at, x);
  for (int i = 0; i < N; ++i) x[i] *= 2.0f;
  store<N>(args.tensor<T>(1) + at, x);
}

template <typename T>
__device__ void double_any_vectors(const Args& args) {
  switch (args.numbers[0]) {
    case 1:
      return double_vectors<T, 1>(args);
    case 2:
      return double_vectors<T, 2>(args);
    case 4:
      return double_vectors<T, 4>(args);
    case 8:
      return double_vectors<T, 8>(args);
  }
}
PROOF_KERNEL(vectors_fp32) { double_any_vectors<float>(args); }
PROOF_KERNEL(vectors_bf16) { double_any_vectors<__nv_bfloat16>(args); }
PROOF_KERNEL(vectors_fp16) { double_any_vectors<__half>(args); }

// y[i] = x[offset + i * stride]. Numbers: stride, offset.
PROOF_KERNEL(gather) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const float x = args.tensor<float>(0)[args.numbers[1] + i * args.numbers[0]];  // TRACED: gather
  args.tensor<float>(1)[i] = x;                                                  // TRACED: gathered
}

// Lanes 0, 8, 16 and 24 move an element each.
PROOF_KERNEL(few_lanes) {
  const int lane = threadIdx.x;
  if (lane % 8 == 0) args.tensor<float>(1)[lane] = args.tensor<float>(0)[lane];  // TRACED: few lanes
}

// x [32, 32] -> its transpose, through a tile whose rows are kPitch apart.
template <int kPitch>
__device__ void transpose(const Args& args) {
  FASTLM_SHARED(float, tile, [32][kPitch]);
  const int row = threadIdx.x / 32, lane = threadIdx.x % 32;
  tile[row][lane] = args.tensor<float>(0)[row * 32 + lane];  // TRACED: rows
  __syncthreads();
  args.tensor<float>(1)[row * 32 + lane] = tile[lane][row];  // TRACED: columns
}
PROOF_KERNEL(transpose_unpadded) { transpose<32>(args); }
PROOF_KERNEL(transpose_padded) { transpose<33>(args); }

// x [32, N] -> y: vectors of N fp32 through shared memory. Number: N.
template <typename Vector>
__device__ void through_shared(const Args& args) {
  FASTLM_DYNAMIC_SHARED(Vector, tile);
  tile[threadIdx.x] = args.tensor<Vector>(0)[threadIdx.x];  // TRACED: into shared
  __syncwarp();
  args.tensor<Vector>(1)[threadIdx.x] = tile[threadIdx.x ^ 31];  // TRACED: from shared
}
PROOF_KERNEL(through_shared_4_bytes) { through_shared<float>(args); }
PROOF_KERNEL(through_shared_8_bytes) { through_shared<float2>(args); }
PROOF_KERNEL(through_shared_16_bytes) { through_shared<float4>(args); }

// Of shared memory every lane reads one word, then two words that are as far apart as the banks go round.
PROOF_KERNEL(shared_broadcast) {
  FASTLM_SHARED(float, tile, [64]);
  const int lane = threadIdx.x;
  tile[lane] = args.tensor<float>(0)[lane];
  tile[lane + 32] = args.tensor<float>(0)[lane];
  __syncwarp();
  const float one = tile[args.numbers[0]];                             // TRACED: one word
  const float two = tile[args.numbers[0] + (lane % 2 == 0 ? 0 : 32)];  // TRACED: two words of a bank
  args.tensor<float>(1)[lane] = one + two;
}

// x [16, 64] of 16 bits -> four 8 x 8 matrices of its first 16 columns [32, 4]. With kSwizzle, the pieces of 16 bytes
// of a row are exchanged by the row's number.
template <bool kSwizzle>
__device__ void load_from_tile(const Args& args) {
  FASTLM_SHARED(uint4, tile, [16][8]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 8; i += 32) {
    const int row = i / 8, piece = i % 8;
    cp_async<16>(&tile[row][kSwizzle ? piece ^ (row % 8) : piece], args.tensor<uint4>(0) + i);  // TRACED: copy
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  const int row = lane % 16, piece = lane / 16;
  uint32_t d[4];
  ldmatrix<4>(d, &tile[row][kSwizzle ? piece ^ (row % 8) : piece]);  // TRACED: ldmatrix
  for (int i = 0; i < 4; ++i) args.tensor<uint32_t>(1)[lane * 4 + i] = d[i];
}
PROOF_KERNEL(unswizzled_tile) { load_from_tile<false>(args); }
PROOF_KERNEL(swizzled_tile) { load_from_tile<true>(args); }

// y[i % n] += x[i]. Number: n.
PROOF_KERNEL(histogram) {
  const int i = threadIdx.x;
  atomicAdd(args.tensor<float>(1) + i % args.numbers[0], args.tensor<float>(0)[i]);  // TRACED: atomic
}

// Dropout's words for rows that no launch of the tests reaches: rng_state [2], rows [32] -> [32, 4].
PROOF_KERNEL(dropout_words) {
  const int lane = threadIdx.x;
  const Philox4 words = Dropout::words(args.tensor<int64_t>(0), args.tensor<int64_t>(1)[lane], lane);
  for (int i = 0; i < 4; ++i) args.tensor<int64_t>(2)[lane * 4 + i] = words.at[i];
}

}  // namespace proof
}  // namespace fastlm
