// What the emulator's own files share: the block that runs, how it is to run, and what the trace build is told of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/device.cuh"

namespace fastlm {
namespace emulator {

constexpr int kWarpLanes = 32, kMaxBlock = 1024, kBarriers = 16;
constexpr size_t kStaticShared = 48 << 10, kOptInShared = 227 << 10;  // bytes of a block; the larger one on sm_90

// How kernels run. Every combination is a legal execution on a GPU.
struct Settings {
  // Adversarial: a thread runs until it must wait, then the last one that can; a warp stays ahead of the others while
  // it can. Round robin: the next in order. Random: any.
  enum Schedule { kAdversarial, kRoundRobin, kRandom } schedule = kAdversarial;
  bool eager = false;          // asynchronous copies land when they are issued, not when they are waited for
  bool random_blocks = false;  // blocks run in a random order
  uint64_t seed = 0;
  // Called instead of running a kernel, if set: its address, grid, block, shared bytes, parameters and their size.
  const char* (*executor)(const void*, const unsigned*, const unsigned*, size_t, const void*, size_t) = nullptr;
};
extern Settings settings;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int size, bytes;
};

struct Thread {
  int number, warp, lane;
  void* stack_pointer;
  void* fake_stack;  // AddressSanitizer's
  uint3 index;
  const char *waits_for, *file;  // while it waits
  int line;
  void* operands;                         // of the collective that it waits in
  std::vector<std::vector<Copy>> groups;  // of copies under way, the last one open
  int inside;                             // more than 0 in the emulator's own code, whose accesses are not a kernel's
};

struct Segment {
  const void* identity;  // of static shared memory; null of dynamic
  unsigned char* data;
  size_t bytes;
};

struct Block {
  const Launch* launch;
  std::string kernel;
  int threads;
  std::vector<Segment> shared;
};
extern Block block;

const char* run_by_name(const std::string& name, dim3 grid, dim3 threads, const void* params, size_t params_bytes,
                        size_t shared_bytes, bool opt_in);

// While a thread runs the emulator's own code.
struct Inside {
  Inside();
  ~Inside();
  Thread* thread;
};

Thread* current();                   // null outside of kernels
bool on_a_stack(uintptr_t address);  // of a thread
const Segment* shared_at(uintptr_t address, size_t bytes);

[[noreturn]] void fail(const std::string& message, const char* file = nullptr, int line = 0);

std::string kernel_name(const void* kernel);
uintptr_t module_base();                                       // where the shared library begins in memory
std::string explain(const std::vector<uintptr_t>& addresses);  // "where.cu:12 in function", innermost first
std::vector<uintptr_t> call_stack();                           // of the current thread

// The trace build's view; the others have nothing behind these.
using Clock = std::vector<uint32_t>;  // for each thread of the block, up to when it is known
enum class Access { kLoad, kStore, kCopy, kAtomic };
#ifdef FASTLM_EMULATOR_TRACE
void trace_launch();
void trace_block();
void trace_shared(const Segment& segment);
void trace_end_of_block();
void trace_access(const void* p, size_t bytes, Access access, uintptr_t place, const Thread& thread);
void trace_arrive(Clock& clock, int thread);  // what the thread did before is before what they do who depart
void trace_depart(const Clock& clock, int thread);
void trace_sync_block();
void trace_requests(int warp);  // what lanes did up to here belongs together
void trace_issue(const Copy& copy, uintptr_t place);
void trace_land(const Copy& copy);
void trace_ldmatrix(const void* const* rows, int matrices, uintptr_t place);

// Memory that kernels may access, with everything else forgotten; whether it may be written, and holds values.
void forget_regions();
void add_region(uintptr_t address, size_t bytes, bool writable, bool initialised);

struct Region {
  uintptr_t begin;
  size_t bytes;
  bool writable, initialised;  // from the start
  uint64_t read, written;      // bytes
};
const std::vector<Region>& regions();

// What one instruction has done, in all warps.
struct Line {
  std::string kernel;
  uintptr_t place;
  bool shared;
  Access access;
  int width;          // bytes of a lane
  uint64_t requests;  // of warps
  uint64_t bytes, sectors, ideal_sectors, wavefronts, ideal_wavefronts;
};
std::vector<Line> take_lines();
#else
inline void trace_launch() {}
inline void trace_block() {}
inline void trace_shared(const Segment&) {}
inline void trace_end_of_block() {}
inline void trace_access(const void*, size_t, Access, uintptr_t, const Thread&) {}
inline void trace_arrive(Clock&, int) {}
inline void trace_depart(const Clock&, int) {}
inline void trace_sync_block() {}
inline void trace_requests(int) {}
inline void trace_issue(const Copy&, uintptr_t) {}
inline void trace_land(const Copy&) {}
inline void trace_ldmatrix(const void* const*, int, uintptr_t) {}
#endif

}  // namespace emulator
}  // namespace fastlm
