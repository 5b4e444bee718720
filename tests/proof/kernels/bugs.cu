// A bug in each kernel, made on purpose: what the proof is for, it must see. An error names one of the lines with the
// comment BUG. test_emulator.py says which layer must see which bug, and what it must say.
#include "common/vec.cuh"
#include "proof_kernel.h"

namespace fastlm {
namespace proof {
namespace {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

}  // namespace

// Races between threads ----------------------------------------------------------------------------------------------

// x [64] -> [64], reversed.
PROOF_KERNEL(missing_barrier) {
  FASTLM_SHARED(float, tile, [64]);
  tile[threadIdx.x] = -1.0f;
  __syncthreads();
  tile[threadIdx.x] = args.tensor<float>(0)[threadIdx.x];       // BUG
  args.tensor<float>(1)[threadIdx.x] = tile[63 - threadIdx.x];  // BUG
}

// x [32] -> [32], reversed: on today's devices the lanes of a warp need not go together.
PROOF_KERNEL(missing_syncwarp) {
  FASTLM_SHARED(float, tile, [32]);
  tile[threadIdx.x] = -1.0f;
  __syncwarp();
  tile[threadIdx.x] = args.tensor<float>(0)[threadIdx.x];       // BUG
  args.tensor<float>(1)[threadIdx.x] = tile[31 - threadIdx.x];  // BUG
}

// x [64] -> [64], reversed: __syncwarp is not enough between warps.
PROOF_KERNEL(syncwarp_between_warps) {
  FASTLM_SHARED(float, tile, [64]);
  tile[threadIdx.x] = -1.0f;
  __syncthreads();
  tile[threadIdx.x] = args.tensor<float>(0)[threadIdx.x];  // BUG
  __syncwarp();
  args.tensor<float>(1)[threadIdx.x] = tile[63 - threadIdx.x];  // BUG
}

// x [steps, 64] -> [steps, 64], each reversed. Number: steps. Between the read of a step and the write of the next one
// there is no barrier.
PROOF_KERNEL(reused_buffer) {
  FASTLM_SHARED(float, tile, [64]);
  for (int step = 0; step < args.numbers[0]; ++step) {
    tile[threadIdx.x] = args.tensor<float>(0)[step * 64 + threadIdx.x];  // BUG
    __syncthreads();
    args.tensor<float>(1)[step * 64 + threadIdx.x] = tile[63 - threadIdx.x];  // BUG
  }
}

// The same with two buffers filled by copies: the next copy into a buffer does not wait for the reads of the last one.
PROOF_KERNEL(reused_copy_buffer) {
  FASTLM_SHARED(float, tile, [2][64]);
  const int steps = static_cast<int>(args.numbers[0]), thread = threadIdx.x;
  const float* const x = args.tensor<float>(0) + thread;
  cp_async<4>(&tile[0][thread], x);
  cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) cp_async<4>(&tile[(step + 1) % 2][thread], x + (step + 1) * 64);  // BUG
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    args.tensor<float>(1)[step * 64 + thread] = tile[step % 2][63 - thread];  // BUG
  }
}

// x [64] -> y [64], reversed, and scratch [64] in global memory.
PROOF_KERNEL(global_race) {
  float* const scratch = args.tensor<float>(2);
  scratch[threadIdx.x] = args.tensor<float>(0)[threadIdx.x];       // BUG
  args.tensor<float>(1)[threadIdx.x] = scratch[63 - threadIdx.x];  // BUG
}

// x [blocks, 32] -> [32]: who writes last?
PROOF_KERNEL(two_blocks_one_element) {
  float* const y = args.tensor<float>(1);
  y[threadIdx.x] = args.tensor<float>(0)[blockIdx.x * 32 + threadIdx.x];  // BUG
}

// x [blocks, 32] -> [blocks, 32]: a block reads what the one before has written.
PROOF_KERNEL(block_reads_another) {
  float* const y = args.tensor<float>(1);
  const int at = blockIdx.x * 32 + threadIdx.x;
  y[at] = args.tensor<float>(0)[at] + (blockIdx.x == 0 ? 0.0f : y[at - 32]);  // BUG
}

// x [64] -> cell [1]: all but one thread add to the cell as they should.
PROOF_KERNEL(store_beside_atomics) {
  float* const cell = args.tensor<float>(1);
  const float x = args.tensor<float>(0)[threadIdx.x];
  if (threadIdx.x == 40) {
    *cell += x;  // BUG
  } else {
    atomicAdd(cell, x);  // BUG
  }
}

// Copies -------------------------------------------------------------------------------------------------------------

// x [64] -> [64]: of two groups the second one is read too, and the wait is for the first.
PROOF_KERNEL(short_wait) {
  FASTLM_SHARED(float, tile, [2][32]);
  const int lane = threadIdx.x;
  const float* const x = args.tensor<float>(0) + lane;
  float* const y = args.tensor<float>(1) + lane;
  tile[1][lane] = -1.0f;
  cp_async<4>(&tile[0][lane], x);
  cp_async_commit();
  cp_async<4>(&tile[1][lane], x + 32);
  cp_async_commit();
  cp_async_wait<1>();
  y[0] = tile[0][lane];
  y[32] = tile[1][lane];  // BUG
}

// x [32] -> [32].
PROOF_KERNEL(missing_wait) {
  FASTLM_SHARED(float, tile, [32]);
  const int lane = threadIdx.x;
  tile[lane] = -1.0f;
  cp_async<4>(&tile[lane], args.tensor<float>(0) + lane);
  cp_async_commit();
  args.tensor<float>(1)[lane] = tile[lane];  // BUG
}

// x [32] -> [32]: a copy that belongs to no group is not waited for.
PROOF_KERNEL(missing_commit) {
  FASTLM_SHARED(float, tile, [32]);
  const int lane = threadIdx.x;
  tile[lane] = -1.0f;
  cp_async<4>(&tile[lane], args.tensor<float>(0) + lane);
  cp_async_wait<0>();
  args.tensor<float>(1)[lane] = tile[lane];  // BUG
}

// x [64] -> [64], reversed: who has waited has seen its own copies only.
PROOF_KERNEL(missing_barrier_after_wait) {
  FASTLM_SHARED(float, tile, [64]);
  const int thread = threadIdx.x;
  tile[thread] = -1.0f;
  __syncthreads();
  cp_async<4>(&tile[thread], args.tensor<float>(0) + thread);  // BUG
  cp_async_commit();
  cp_async_wait<0>();
  args.tensor<float>(1)[thread] = tile[63 - thread];  // BUG
}

// x [64] -> [64], reversed: a barrier alone does not make the others' copies land.
PROOF_KERNEL(wait_after_barrier) {
  FASTLM_SHARED(float, tile, [64]);
  const int thread = threadIdx.x;
  tile[thread] = -1.0f;
  __syncthreads();
  cp_async<4>(&tile[thread], args.tensor<float>(0) + thread);  // BUG
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
  args.tensor<float>(1)[thread] = tile[63 - thread];  // BUG
}

// x [32] -> [32]: a store to where a copy is about to land.
PROOF_KERNEL(store_under_copy) {
  FASTLM_SHARED(float, tile, [32]);
  const int lane = threadIdx.x;
  cp_async<4>(&tile[lane], args.tensor<float>(0) + lane);
  cp_async_commit();
  tile[lane] = 0.0f;  // BUG
  cp_async_wait<0>();
  args.tensor<float>(1)[lane] = tile[lane];
}

// Memory -------------------------------------------------------------------------------------------------------------

// x [32] -> [32]. Number: by how much the index is wrong, here and in the next ones.
PROOF_KERNEL(shared_overrun) {
  FASTLM_SHARED(float, tile, [32]);
  tile[threadIdx.x + args.numbers[0]] = args.tensor<float>(0)[threadIdx.x];  // BUG
  __syncthreads();
  args.tensor<float>(1)[threadIdx.x] = tile[threadIdx.x];
}

PROOF_KERNEL(shared_underrun) {
  FASTLM_SHARED(float, tile, [32]);
  tile[threadIdx.x] = args.tensor<float>(0)[threadIdx.x];
  __syncthreads();
  args.tensor<float>(1)[threadIdx.x] = tile[static_cast<int>(threadIdx.x) - args.numbers[0]];  // BUG
}

// The launcher asks for 32 elements.
PROOF_KERNEL(dynamic_shared_overrun) {
  FASTLM_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + args.numbers[0]] = args.tensor<float>(0)[threadIdx.x];  // BUG
  __syncthreads();
  args.tensor<float>(1)[threadIdx.x] = tile[threadIdx.x];
}

PROOF_KERNEL(wrong_global_read) {
  args.tensor<float>(1)[threadIdx.x] = args.tensor<float>(0)[threadIdx.x + args.numbers[0]];  // BUG
}

PROOF_KERNEL(wrong_global_write) {
  args.tensor<float>(1)[threadIdx.x + args.numbers[0]] = args.tensor<float>(0)[threadIdx.x];  // BUG
}

// x [32 * 4] -> [32 * 4], by copies of 16 bytes. Number: by how many elements the source is wrong.
PROOF_KERNEL(wrong_copy) {
  FASTLM_SHARED(float4, tile, [32]);
  const int lane = threadIdx.x;
  cp_async<16>(&tile[lane], args.tensor<float>(0) + lane * 4 + args.numbers[0]);  // BUG
  cp_async_commit();
  cp_async_wait<0>();
  args.tensor<float4>(1)[lane] = tile[lane];
}

// The same, for where the copies land.
PROOF_KERNEL(wrong_copy_target) {
  FASTLM_SHARED(float4, tile, [32]);
  const int lane = threadIdx.x;
  float* const to = reinterpret_cast<float*>(tile) + lane * 4 + args.numbers[0];
  cp_async<16>(to, args.tensor<float>(0) + lane * 4);  // BUG
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  args.tensor<float4>(1)[lane] = tile[lane];
}

// x [32 * 4] -> [32 * 4], in vectors. Number: by how many elements both are wrong.
PROOF_KERNEL(wrong_vectors) {
  float x[4];
  load<4>(args.tensor<float>(0) + threadIdx.x * 4 + args.numbers[0], x);  // BUG
  store<4>(args.tensor<float>(1) + threadIdx.x * 4, x);
}

PROOF_KERNEL(wrong_vector_stores) {
  float x[4];
  load<4>(args.tensor<float>(0) + threadIdx.x * 4, x);
  store<4>(args.tensor<float>(1) + threadIdx.x * 4 + args.numbers[0], x);  // BUG
}

// Rows [32, 8] of 16 bits -> registers [32, 4]. Number: by how many elements the addresses of the rows are wrong.
PROOF_KERNEL(wrong_matrix_rows) {
  FASTLM_SHARED(uint4, tile, [33]);
  const int lane = threadIdx.x;
  tile[lane] = args.tensor<uint4>(0)[lane];
  if (lane == 0) tile[32] = tile[0];
  __syncwarp();
  uint32_t d[4];
  ldmatrix<4>(d, reinterpret_cast<const __half*>(tile + lane) + args.numbers[0]);  // BUG
  for (int i = 0; i < 4; ++i) args.tensor<uint32_t>(1)[lane * 4 + i] = d[i];
}

// x [32] -> [32] and, in place, x.
PROOF_KERNEL(write_to_input) {
  float* const x = args.tensor<float>(0);
  args.tensor<float>(1)[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = 0.0f;  // BUG
}

// y [blocks, 32]: what shared memory holds before anything is written to it, which then is.
PROOF_KERNEL(uninitialised_shared) {
  FASTLM_SHARED(float, tile, [32]);
  args.tensor<float>(0)[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x];  // BUG
  tile[threadIdx.x] = 42.0f;
}

PROOF_KERNEL(uninitialised_dynamic_shared) {
  FASTLM_DYNAMIC_SHARED(float, tile);
  args.tensor<float>(0)[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x];  // BUG
  tile[threadIdx.x] = 42.0f;
}

// x [32] -> y [32], which is added to without having been set.
PROOF_KERNEL(uninitialised_global) {
  args.tensor<float>(1)[threadIdx.x] += args.tensor<float>(0)[threadIdx.x];  // BUG
}

// Rows [32, 8] of 16 bits -> registers [32, 4]: one of the rows that ldmatrix reads has not been written.
PROOF_KERNEL(uninitialised_matrix) {
  FASTLM_SHARED(uint4, tile, [32]);
  const int lane = threadIdx.x;
  if (lane != 17) tile[lane] = args.tensor<uint4>(0)[lane];
  __syncwarp();
  uint32_t d[4];
  ldmatrix<4>(d, tile + lane);  // BUG
  for (int i = 0; i < 4; ++i) args.tensor<uint32_t>(1)[lane * 4 + i] = d[i];
}

// Collectives --------------------------------------------------------------------------------------------------------

// Half of the lanes arrive, all are named.
PROOF_KERNEL(divergent_shuffle) {
  const int lane = threadIdx.x;
  float x = args.tensor<float>(0)[lane];
  if (lane < 16) x = __shfl_xor_sync(kFullWarp, x, 1);  // BUG
  args.tensor<float>(1)[lane] = x;
}

PROOF_KERNEL(shuffle_from_an_absent_lane) {
  const int lane = threadIdx.x;
  float x = args.tensor<float>(0)[lane];
  if (lane < 16) x = __shfl_sync(0x0000FFFFu, x, lane + 16);  // BUG
  args.tensor<float>(1)[lane] = x;
}

PROOF_KERNEL(shuffle_without_its_own_lane) {
  const int lane = threadIdx.x;
  const float x = args.tensor<float>(0)[lane];
  args.tensor<float>(1)[lane] = __shfl_xor_sync(0x0000FFFFu, x, 1);  // BUG
}

PROOF_KERNEL(shuffles_with_two_masks) {
  const int lane = threadIdx.x;
  const float x = args.tensor<float>(0)[lane];
  args.tensor<float>(1)[lane] = __shfl_xor_sync(lane == 5 ? 0x0000FFFFu : kFullWarp, x, 1);  // BUG
}

PROOF_KERNEL(shuffle_meets_vote) {
  const int lane = threadIdx.x;
  const int x = args.tensor<int>(0)[lane];
  int y;
  if (lane < 16) {
    y = __shfl_xor_sync(kFullWarp, x, 1);  // BUG
  } else {
    y = static_cast<int>(__ballot_sync(kFullWarp, x));  // BUG
  }
  args.tensor<int>(1)[lane] = y;
}

PROOF_KERNEL(shuffle_after_return) {
  const int lane = threadIdx.x;
  if (lane == 31) return;
  const float x = args.tensor<float>(0)[lane];
  args.tensor<float>(1)[lane] = __shfl_down_sync(kFullWarp, x, 1);  // BUG
}

PROOF_KERNEL(divergent_mma) {
  const int lane = threadIdx.x;
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (lane % 2 == 0) mma_16816<__half>(d, a, b);  // BUG
  args.tensor<float>(1)[lane] = d[0];
}

PROOF_KERNEL(divergent_ldmatrix) {
  FASTLM_SHARED(uint4, tile, [32]);
  const int lane = threadIdx.x;
  tile[lane] = make_uint4(0, 0, 0, 0);
  __syncwarp();
  uint32_t d[1] = {};
  if (lane < 8) ldmatrix<1>(d, tile + lane);  // BUG
  args.tensor<uint32_t>(1)[lane] = d[0];
}

PROOF_KERNEL(divergent_syncwarp) {
  if (threadIdx.x != 3) __syncwarp();  // BUG
  args.tensor<float>(1)[threadIdx.x] = 0.0f;
}

PROOF_KERNEL(barrier_in_a_branch) {
  if (threadIdx.x % 2 == 0) {
    args.tensor<float>(1)[threadIdx.x] = 0.0f;
    __syncthreads();  // BUG
  } else {
    args.tensor<float>(1)[threadIdx.x] = 1.0f;
    __syncthreads();  // BUG
  }
}

PROOF_KERNEL(barrier_of_some) {
  if (threadIdx.x < 40) __syncthreads();  // BUG
  args.tensor<float>(1)[threadIdx.x] = 0.0f;
}

PROOF_KERNEL(return_before_barrier) {
  if (threadIdx.x >= 40) return;  // BUG
  __syncthreads();                // BUG
  args.tensor<float>(1)[threadIdx.x] = 0.0f;
}

// Warps that go round a loop with a barrier in it once more than others.
PROOF_KERNEL(one_barrier_more) {
  for (int i = 0; i < 2 + static_cast<int>(threadIdx.x) / 32; ++i) __syncthreads();  // BUG
}

// 64 threads, of which 96 are expected.
PROOF_KERNEL(barrier_for_more) { barrier_sync(1, 96); }  // BUG

PROOF_KERNEL(barrier_for_half_a_warp) { barrier_sync(1, 48); }  // BUG

PROOF_KERNEL(barrier_with_two_counts) { barrier_sync(1, threadIdx.x < 32 ? 64 : 96); }  // BUG

PROOF_KERNEL(barrier_out_of_range) { barrier_sync(static_cast<int>(args.numbers[0]), 64); }  // BUG

PROOF_KERNEL(barriers_in_two_orders) {
  const int warp = threadIdx.x / 32;
  barrier_sync(1 + warp, 64);  // BUG
  barrier_sync(2 - warp, 64);
}

// Language -----------------------------------------------------------------------------------------------------------

// a [32], b [32] -> [32].
PROOF_KERNEL(signed_overflow) {
  args.tensor<int>(2)[threadIdx.x] = args.tensor<int>(0)[threadIdx.x] + args.tensor<int>(1)[threadIdx.x];  // BUG
}

PROOF_KERNEL(shift_out_of_range) {
  args.tensor<int>(2)[threadIdx.x] = args.tensor<int>(0)[threadIdx.x] << args.tensor<int>(1)[threadIdx.x];  // BUG
}

// Number: the element of a thread's own 8 that is set.
PROOF_KERNEL(local_overrun) {
  float own[8] = {};
  own[args.numbers[0]] = args.tensor<float>(0)[threadIdx.x];  // BUG
  float sum = 0.0f;
  for (int i = 0; i < 8; ++i) sum += own[(i + threadIdx.x) % 8];
  args.tensor<float>(1)[threadIdx.x] = sum;
}

// Launches -----------------------------------------------------------------------------------------------------------

#ifndef __CUDACC__  // ptxas sees it
PROOF_KERNEL(too_much_static_shared) {
  FASTLM_SHARED(float, tile, [12289]);
  tile[threadIdx.x] = 0.0f;
}
#endif

}  // namespace proof
}  // namespace fastlm
