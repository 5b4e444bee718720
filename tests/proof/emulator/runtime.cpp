// Runs the threads of a block as fibers, one at a time: who runs next, barriers, collectives, asynchronous copies, and
// the checks of how they are used.
#include "runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>

#include "common/kernel_attributes.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Puts the registers that a call preserves on this stack, leaves its pointer in *from, and goes on with the other.
extern "C" void fastlm_switch_stack(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl fastlm_switch_stack
.hidden fastlm_switch_stack
.type fastlm_switch_stack, @function
fastlm_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastlm_switch_stack, .-fastlm_switch_stack
)");
constexpr int kSavedWords = 8, kReturnWord = 6;  // and a word that keeps the stack aligned at the entry of a function
#elif defined(__aarch64__)
asm(R"(
.text
.globl fastlm_switch_stack
.hidden fastlm_switch_stack
.type fastlm_switch_stack, @function
fastlm_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastlm_switch_stack, .-fastlm_switch_stack
)");
constexpr int kSavedWords = 20, kReturnWord = 11;
#else
#error "the emulator switches stacks on x86-64 and aarch64 only"
#endif

namespace fastlm {
namespace emulator {

Settings settings;
Block block;

Inside::Inside() : thread(current()) { ++thread->inside; }
Inside::~Inside() { --thread->inside; }

namespace {

constexpr size_t kStack = 256 << 10, kPage = 4096, kPoisonedStack = 4096;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating type

struct Collective {
  const char *what, *file;
  int line;
  uint32_t mask, arrived;
  void* operands[kWarpLanes];
  Clock clock;
};

struct Barrier {
  const char *what = nullptr, *file = nullptr;
  int line = 0, threads = 0, arrived = 0;
  std::vector<int> waiting;
  Clock clock;

  int most() const;  // threads that can arrive before it is complete
};

struct Warp {
  uint32_t exist, ready, done;
  std::vector<Collective> collectives;  // that wait for more lanes; their masks are disjoint
};

unsigned char* stacks;
std::vector<Thread> threads;
Warp warps[kWarpLanes];
uint32_t ready_warps;
Barrier barriers[kBarriers];
Thread* running;
int done;
void* main_stack;
uint64_t random_state;
std::string error;
std::mutex mutex;

#if defined(__SANITIZE_ADDRESS__)
void* main_fake_stack;
const void* main_bottom;
size_t main_size;

std::string described(const Thread& thread);
std::string shape(const dim3& d);

// The sanitizers end the process, and know lines but no threads of ours.
void say_where() {
  if (running == nullptr) return;
  const std::string index = shape({blockIdx.x, blockIdx.y, blockIdx.z});
  std::fprintf(stderr, "in %s, block %s, %s\n", block.kernel.c_str(), index.c_str(), described(*running).c_str());
}
#endif

int Barrier::most() const { return arrived + block.threads - done - static_cast<int>(waiting.size()); }

uint64_t random_number() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545F4914F6CDD1Dull;
}

void seed_random(uint64_t n) { random_state = (settings.seed * 0x9E3779B97F4A7C15ull + n) * 0xBF58476D1CE4E5B9ull | 1; }

int bit_at(uint32_t bits, int n) {  // the place of the n-th set bit
  while (n-- > 0) bits &= bits - 1;
  return __builtin_ctz(bits);
}

int highest(uint32_t bits) { return 31 - __builtin_clz(bits); }

unsigned char* stack_of(int thread) { return stacks + thread * kStack; }

// Switching --------------------------------------------------------------------------------------------------------

void enter(Thread* to) {
  running = to;
  if (to != nullptr) threadIdx = to->index;
}

void switch_to(Thread* to, bool for_good = false) {
  Thread* from = running;
  enter(to);
#if defined(__SANITIZE_ADDRESS__)
  void** keep = from == nullptr ? &main_fake_stack : &from->fake_stack;
  const void* bottom = to == nullptr ? main_bottom : stack_of(to->number);
  __sanitizer_start_switch_fiber(for_good ? nullptr : keep, bottom, to == nullptr ? main_size : kStack);
#else
  (void)for_good;
#endif
  fastlm_switch_stack(from == nullptr ? &main_stack : &from->stack_pointer,
                      to == nullptr ? main_stack : to->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(*keep, nullptr, nullptr);
#endif
}

void set_ready(int number, bool is_ready) {
  Warp& warp = warps[number / kWarpLanes];
  const uint32_t bit = 1u << number % kWarpLanes;
  warp.ready = is_ready ? warp.ready | bit : warp.ready & ~bit;
  const uint32_t warp_bit = 1u << number / kWarpLanes;
  ready_warps = warp.ready != 0 ? ready_warps | warp_bit : ready_warps & ~warp_bit;
}

Thread* next_thread() {
  if (ready_warps == 0) return nullptr;
  const int here = running == nullptr ? block.threads - 1 : running->number;  // a block begins as if its last had run
  int warp, lane;
  if (settings.schedule == Settings::kRandom) {
    warp = bit_at(ready_warps, static_cast<int>(random_number() % __builtin_popcount(ready_warps)));
    lane = bit_at(warps[warp].ready, static_cast<int>(random_number() % __builtin_popcount(warps[warp].ready)));
  } else if (settings.schedule == Settings::kRoundRobin) {
    warp = here / kWarpLanes;
    uint32_t later = warps[warp].ready & static_cast<uint32_t>(~((uint64_t{2} << here % kWarpLanes) - 1));
    if (later == 0) {
      const uint32_t later_warps = ready_warps & static_cast<uint32_t>(~((uint64_t{2} << warp) - 1));
      warp = __builtin_ctz(later_warps != 0 ? later_warps : ready_warps);
      later = warps[warp].ready;
    }
    lane = __builtin_ctz(later);
  } else {
    warp = here / kWarpLanes;
    if (warps[warp].ready == 0) warp = highest(ready_warps);
    lane = highest(warps[warp].ready);
  }
  return &threads[warp * kWarpLanes + lane];
}

std::string described(const Thread& thread) {
  return "thread (" + std::to_string(thread.index.x) + ", " + std::to_string(thread.index.y) + ", " +
         std::to_string(thread.index.z) + ")";
}

std::string place(const char* file, int line) {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

std::string waiting() {
  std::map<std::string, std::pair<int, const Thread*>> at;
  for (const Thread& thread : threads) {
    if (thread.number >= block.threads || thread.waits_for == nullptr) continue;
    auto& entry = at[std::string(thread.waits_for) + " at " + place(thread.file, thread.line)];
    if (entry.first++ == 0) entry.second = &thread;
  }
  std::string text;
  for (const auto& [what, entry] : at) {
    text += (text.empty() ? "" : "; ") + std::to_string(entry.first) + " in " + what + ", first " +
            described(*entry.second);
  }
  return text;
}

// Lets others run until this thread is ready again.
void wait(const char* what, const char* file, int line) {
  running->waits_for = what;
  running->file = file;
  running->line = line;
  Thread* next = next_thread();
  if (next == nullptr) fail("deadlock: all threads wait or have exited: " + waiting(), file, line);
  if (next != running) switch_to(next);
  running->waits_for = nullptr;
}

void go_on() {  // the running thread is ready, and so may be others
  if (settings.schedule == Settings::kAdversarial) return;
  Thread* next = next_thread();
  if (next != running) switch_to(next);
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  if (done == 0 && main_bottom == nullptr) {
    __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
  } else {
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  }
#endif
  block.launch->call(block.launch->kernel, block.launch->params);
  Thread& self = *running;
  ++self.inside;
  Warp& warp = warps[self.warp];
  set_ready(self.number, false);
  warp.done |= 1u << self.lane;
  ++done;
  for (const Collective& other : warp.collectives) {
    if (other.mask >> self.lane & 1u) {
      fail("exits while others of its warp wait for it in " + std::string(other.what), other.file, other.line);
    }
  }
  for (const Barrier& other : barriers) {
    if (other.arrived != 0 && other.most() < other.threads) {
      fail("exits past a barrier at which others wait: " + std::string(other.what), other.file, other.line);
    }
  }
  if (done == block.threads) switch_to(nullptr, true);
  Thread* next = next_thread();
  if (next == nullptr) fail("deadlock: all threads wait or have exited: " + waiting());
  switch_to(next, true);
  __builtin_unreachable();
}

// Blocks and launches ----------------------------------------------------------------------------------------------

void prepare(int number) {
  Thread& thread = threads[number];
  const unsigned x = blockDim.x, y = blockDim.y, n = static_cast<unsigned>(number);
  thread = {number,
            number / kWarpLanes,
            number % kWarpLanes,
            nullptr,
            nullptr,
            {n % x, n / x % y, n / x / y},
            nullptr,
            nullptr,
            0,
            nullptr,
            {}};
  thread.groups.emplace_back();
  warps[thread.warp].exist |= 1u << thread.lane;
  set_ready(number, true);
  // Stacks begin at different places of a page, lest all of them want the same lines of the cache.
  const auto top = reinterpret_cast<uintptr_t>(stack_of(number) + kStack) - static_cast<size_t>(number % 32) * 128;
  std::memset(reinterpret_cast<void*>(top - kPoisonedStack), kPoison, kPoisonedStack);  // so are its variables
  void** words = reinterpret_cast<void**>(top) - kSavedWords;
  std::fill(words, words + kSavedWords, nullptr);
  words[kReturnWord] = reinterpret_cast<void*>(&thread_main);
  thread.stack_pointer = words;
}

void run_block(uint64_t number) {
  const dim3& grid = block.launch->grid;
  blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
              static_cast<unsigned>(number / grid.x / grid.y)};
  seed_random(number + 1);
  std::fill(std::begin(warps), std::end(warps), Warp{});
  std::fill(std::begin(barriers), std::end(barriers), Barrier{});
  ready_warps = 0;
  done = 0;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks, kStack * block.threads);
#endif
  for (int n = 0; n < block.threads; ++n) prepare(n);
  trace_block();
  switch_to(next_thread());
  trace_end_of_block();
  for (const Segment& segment : block.shared) std::free(segment.data);
  block.shared.clear();
}

Segment& add_segment(const void* identity, size_t bytes, size_t alignment) {
  void* data = nullptr;
  if (posix_memalign(&data, std::max(alignment, sizeof(void*)), std::max<size_t>(bytes, 1)) != 0) std::abort();
  std::memset(data, kPoison, bytes);
  block.shared.push_back({identity, static_cast<unsigned char*>(data), bytes});
  trace_shared(block.shared.back());
  return block.shared.back();
}

struct Kernel {
  std::string name;
  int max_threads;
  size_t opted_in;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

std::map<std::string, Launch>& runnables() {
  static std::map<std::string, Launch> all;
  return all;
}

std::string shape(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string wrong_with(const Launch& launch) {
  const dim3 &grid = launch.grid, &threads = launch.block;
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  const auto found = kernels().find(launch.kernel);
  if (found == kernels().end()) return "the kernel is not registered (register_kernel)";
  if (count == 0 || threads.x > 1024 || threads.y > 1024 || threads.z > 64 || count > kMaxBlock) {
    return "a block has at least one thread and at most 1024, z at most 64; got " + shape(threads);
  }
  if (count > static_cast<uint64_t>(found->second.max_threads)) {
    return "is registered with blocks of " + std::to_string(found->second.max_threads) + " threads, got " +
           shape(threads);
  }
  if (uint64_t{grid.x} * grid.y * grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    return "a grid is at least 1 and at most (2147483647, 65535, 65535), got " + shape(grid);
  }
  if (launch.shared_bytes > std::max(kSharedWithoutOptIn, found->second.opted_in)) {
    return std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory, more than 49152, without opting in";
  }
  return "";
}

void run_checked(const Launch& launch) {
  error.clear();
  const std::string wrong = wrong_with(launch);
  block.kernel = kernel_name(launch.kernel);
  if (!wrong.empty()) {
    error = block.kernel + ": " + wrong;
    return;
  }
  if (settings.executor != nullptr) {
    const unsigned grid[] = {launch.grid.x, launch.grid.y, launch.grid.z};
    const unsigned threads[] = {launch.block.x, launch.block.y, launch.block.z};
    const char* wrong_there =
        settings.executor(launch.kernel, grid, threads, launch.shared_bytes, launch.params, launch.params_bytes);
    if (wrong_there != nullptr) error = wrong_there;
    return;
  }
  if (stacks == nullptr) {
    void* memory =
        mmap(nullptr, kStack * kMaxBlock, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<unsigned char*>(memory);
#if defined(__SANITIZE_ADDRESS__)
    for (const char* library : {"libasan.so.8", "libasan.so", "libubsan.so.1", "libubsan.so"}) {
      void* const handle = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
      void* const set = handle == nullptr ? nullptr : dlsym(handle, "__sanitizer_set_death_callback");
      if (set != nullptr) reinterpret_cast<void (*)(void (*)())>(set)(say_where);
    }
#endif
    for (int n = 0; n < kMaxBlock; ++n) mprotect(stack_of(n), kPage, PROT_NONE);
  }
  block.launch = &launch;
  block.threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  blockDim = launch.block;
  gridDim = launch.grid;
  if (static_cast<int>(threads.size()) < block.threads) threads.resize(block.threads);
  trace_launch();
  // Blocks in random order: n -> (a n + b) mod count, with a and count coprime.
  const uint64_t count = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  uint64_t factor = 1, first = 0;
  if (settings.random_blocks) {
    seed_random(0);
    do factor = random_number() % count + 1;
    while (std::gcd(factor, count) != 1);
    first = random_number() % count;
  }
  for (uint64_t n = 0; n < count && error.empty(); ++n) {
    run_block(static_cast<uint64_t>((static_cast<unsigned __int128>(n) * factor + first) % count));
  }
}

}  // namespace

Thread* current() { return running; }

bool on_a_stack(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(stacks) < kStack * kMaxBlock; }

const Segment* shared_at(uintptr_t address, size_t bytes) {
  for (const Segment& segment : block.shared) {
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(segment.data);
    if (offset < segment.bytes && bytes <= segment.bytes - offset) return &segment;
  }
  return nullptr;
}

void fail(const std::string& message, const char* file, int line) {
  ++running->inside;
  const std::string index = shape({blockIdx.x, blockIdx.y, blockIdx.z});
  error = block.kernel + ", block " + index + ", " + described(*running) + ": " + message;
  if (file != nullptr) error += "\n  at " + place(file, line);
  const std::string stack = explain(call_stack());
  if (!stack.empty()) error += "\n" + stack;
  switch_to(nullptr, true);
  __builtin_unreachable();
}

void fail(const char* message, const char* file, int line) { fail(std::string(message), file, line); }

std::string kernel_name(const void* kernel) {
  const auto found = kernels().find(kernel);
  return found == kernels().end() ? "unknown kernel" : found->second.name;
}

std::vector<uintptr_t> call_stack() {
  std::vector<uintptr_t> addresses;
  const void* const* frame = static_cast<const void* const*>(__builtin_frame_address(0));
  while (on_a_stack(reinterpret_cast<uintptr_t>(frame)) && frame[1] != nullptr && addresses.size() < 32) {
    addresses.push_back(reinterpret_cast<uintptr_t>(frame[1]) - 1);
    frame = static_cast<const void* const*>(frame[0]);
  }
  return addresses;
}

uintptr_t module_base() {
  Dl_info module;
  return dladdr(reinterpret_cast<const void*>(&run), &module) == 0 ? 0 : reinterpret_cast<uintptr_t>(module.dli_fbase);
}

std::string explain(const std::vector<uintptr_t>& addresses) {
  Dl_info module;
  if (addresses.empty() || dladdr(reinterpret_cast<const void*>(&run), &module) == 0) return "";
  std::string command = "addr2line -C -f -i -p -s -e '" + std::string(module.dli_fname) + "'";
  for (const uintptr_t address : addresses) {
    char hexadecimal[32];
    std::snprintf(hexadecimal, sizeof hexadecimal, " %zx", address - reinterpret_cast<uintptr_t>(module.dli_fbase));
    command += hexadecimal;
  }
  std::string text, line;
  if (FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r")) {
    for (int c; (c = std::fgetc(pipe)) != EOF;) {
      line += static_cast<char>(c);
      if (c != '\n') continue;
      // The emulator's own functions and what C++ puts between a kernel and its launcher say nothing.
      const bool own = line.find("emulator::") != std::string::npos || line.find("emulator.h:") != std::string::npos ||
                       line.find("??") != std::string::npos || line.find("__tsan") != std::string::npos;
      if (!own) text += "  in " + line;
      line.clear();
    }
    pclose(pipe);
  }
  if (!text.empty()) text.pop_back();
  return text;
}

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex);
  run_checked(launch);
}

void add_runnable(const char* name, const Launch& kernel) { runnables()[name] = kernel; }

const char* run_by_name(const std::string& name, dim3 grid, dim3 threads, const void* params, size_t params_bytes,
                        size_t shared_bytes, bool opt_in) {
  const auto found = runnables().find(name);
  if (found == runnables().end()) return "no kernel of this name";
  Launch launch = found->second;
  if (launch.params_bytes != params_bytes) return "takes parameters of another size";
  launch.params = params;
  launch.grid = grid;
  launch.block = threads;
  launch.shared_bytes = shared_bytes;
  kernels()[launch.kernel].opted_in = 0;
  if (opt_in && cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes)) != cudaSuccess) {
    error = name + ": " + cudaGetErrorString(cudaErrorInvalidValue);
    return error.c_str();
  }
  run(launch);
  return error.empty() ? nullptr : error.c_str();
}

// What kernels call ------------------------------------------------------------------------------------------------

void* static_shared(const void* identity, size_t bytes, size_t alignment) {
  const Inside inside;
  size_t total = bytes;
  for (const Segment& segment : block.shared) {
    if (segment.identity == identity) return segment.data;
    if (segment.identity != nullptr) total += segment.bytes;
  }
  if (total > kStaticShared) {
    fail(std::to_string(total) + " bytes of static shared memory, more than " + std::to_string(kStaticShared));
  }
  if (total + block.launch->shared_bytes > kOptInShared) {
    fail(std::to_string(total + block.launch->shared_bytes) + " bytes of shared memory, more than any device has");
  }
  return add_segment(identity, bytes, alignment).data;
}

void* dynamic_shared() {
  const Inside inside;
  for (const Segment& segment : block.shared) {
    if (segment.identity == nullptr) return segment.data;
  }
  return add_segment(nullptr, block.launch->shared_bytes, 128).data;
}

uint32_t running_lanes() { return warps[running->warp].exist & ~warps[running->warp].done; }

void collective(const char* what, uint32_t mask, void* operands, Resolve resolve, const char* file, int line) {
  const Inside inside;
  Thread& self = *running;
  Warp& warp = warps[self.warp];
  const uint32_t bit = 1u << self.lane;
  if ((mask & bit) == 0) fail(std::string(what) + ": the mask lacks the lane that calls", file, line);
  if ((mask & warp.done) != 0) {
    fail(std::string(what) + ": lane " + std::to_string(__builtin_ctz(mask & warp.done)) + " of the mask has exited",
         file, line);
  }
  const auto overlaps = [mask](const Collective& other) { return (other.mask & mask) != 0; };
  auto found = std::find_if(warp.collectives.begin(), warp.collectives.end(), overlaps);
  if (found == warp.collectives.end()) {
    warp.collectives.push_back({what, file, line, mask, 0, {}, {}});
    found = warp.collectives.end() - 1;
  } else if (found->mask != mask || std::strcmp(found->what, what) != 0 || found->line != line ||
             std::strcmp(found->file, file) != 0) {
    fail("divergent collective: came to " + std::string(what) + ", while others of its warp wait for it in " +
             found->what + " at " + place(found->file, found->line),
         file, line);
  }
  const bool orders_memory = std::strcmp(what, "__syncwarp") == 0;
  if (orders_memory) trace_arrive(found->clock, self.number);
  found->arrived |= bit;
  found->operands[self.lane] = operands;
  self.operands = operands;
  if (found->arrived != (mask & warp.exist)) {
    set_ready(self.number, false);
    wait(what, file, line);
    return;
  }
  const Collective complete = std::move(*found);
  warp.collectives.erase(found);
  if (resolve != nullptr) resolve(complete.operands);
  if ((complete.arrived | warp.done) == warp.exist) trace_requests(self.warp);
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if ((complete.arrived >> lane & 1u) == 0) continue;
    const int number = self.warp * kWarpLanes + lane;
    set_ready(number, true);
    if (orders_memory) trace_depart(complete.clock, number);
  }
  go_on();
}

void barrier(const char* what, int number, int count, bool wait_here, const char* file, int line) {
  const Inside inside;
  if (number < 0 || number >= kBarriers) fail(std::string(what) + ": there are barriers 0 to 15", file, line);
  if (count % kWarpLanes != 0 && number != 0) {
    fail(std::string(what) + ": the number of threads is a multiple of 32, got " + std::to_string(count), file, line);
  }
  const bool whole_block = count == 0;
  if (whole_block) count = block.threads;
  Barrier& barrier = barriers[number];
  if (barrier.arrived == 0) {
    barrier.what = what;
    barrier.file = file;
    barrier.line = line;
    barrier.threads = count;
  } else if (barrier.threads != count) {
    fail(std::string(what) + ": barrier " + std::to_string(number) + " is waited for by " + std::to_string(count) +
             " threads here, by " + std::to_string(barrier.threads) + " at " + place(barrier.file, barrier.line),
         file, line);
  } else if (number == 0 && (barrier.line != line || std::strcmp(barrier.file, file) != 0)) {
    fail("divergent barrier: came to " + std::string(what) + ", while others wait at " +
             place(barrier.file, barrier.line),
         file, line);
  }
  if (barrier.most() < count) {
    fail(std::string(what) + ": waits for threads that have exited", file, line);
  }
  Thread& self = *running;
  if (!whole_block) trace_arrive(barrier.clock, self.number);
  ++barrier.arrived;
  if (wait_here) barrier.waiting.push_back(self.number);
  if (barrier.arrived < count) {
    if (!wait_here) return;
    set_ready(self.number, false);
    wait(what, file, line);
    return;
  }
  if (whole_block) {
    trace_sync_block();
    for (int warp = 0; warp * kWarpLanes < block.threads; ++warp) trace_requests(warp);
  }
  const Barrier complete = std::move(barrier);
  barrier = Barrier{};
  for (const int waiter : complete.waiting) {
    set_ready(waiter, true);
    if (!whole_block) trace_depart(complete.clock, waiter);
  }
  go_on();
}

void copy_async(void* shared, const void* global, int size, int bytes, const char* file, int line) {
  const Inside inside;
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  if (to % size != 0 || from % size != 0) fail("cp_async: both addresses are multiples of the size", file, line);
  if (bytes < 0 || bytes > size) {
    fail("cp_async: reads 0 to " + std::to_string(size) + " bytes, got " + std::to_string(bytes), file, line);
  }
  if (shared_at(to, size) == nullptr) fail("cp_async: writes past the block's shared memory", file, line);
  const Copy copy = {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), size, bytes};
  trace_issue(copy, reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1);
  running->groups.back().push_back(copy);
  unsigned char seen[16];
  std::memcpy(seen, copy.from, copy.bytes);  // lest a sanitizer find only in copy_wait that there is nothing to read
  asm volatile("" ::"r"(seen) : "memory");
  if (settings.eager) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, copy.size - copy.bytes);
  }
}

void copy_commit() {
  const Inside inside;
  running->groups.emplace_back();
}

void copy_wait(int pending) {
  const Inside inside;
  auto& groups = running->groups;
  while (static_cast<int>(groups.size()) > pending + 1) {
    for (const Copy& copy : groups.front()) {
      if (!settings.eager) {
        std::memcpy(copy.to, copy.from, copy.bytes);
        std::memset(copy.to + copy.bytes, 0, copy.size - copy.bytes);
      }
      trace_land(copy);
    }
    groups.erase(groups.begin());
  }
}

void atomic_load(const void* p, void* old, size_t bytes, const char* file, int line) {
  const Inside inside;
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("atomic: the address is a multiple of the size", file, line);
  trace_access(p, bytes, Access::kAtomic, reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1, *running);
  std::memcpy(old, p, bytes);
}

void atomic_store(void* p, const void* updated, size_t bytes) { std::memcpy(p, updated, bytes); }

}  // namespace emulator

void register_kernel(const std::string& name, const void* kernel, int threads_per_block, size_t) {
  emulator::kernels()[kernel] = {name, threads_per_block, 0};
}

}  // namespace fastlm

// Of the CUDA runtime, what launchers call --------------------------------------------------------------------------

extern "C" {

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;
  if (value < 0 || static_cast<size_t>(value) > fastlm::emulator::kOptInShared) return cudaErrorInvalidValue;
  fastlm::emulator::kernels()[kernel].opted_in = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return fastlm::emulator::error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }

const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaErrorLaunchFailure:
      return fastlm::emulator::error.c_str();
    case cudaErrorInvalidDevice:
      return "cudaSetDevice: the emulator is device 0";
    case cudaErrorInvalidValue:
      return "cudaFuncSetAttribute: more dynamic shared memory than any device has (232448 bytes)";
    default:
      return "not supported by the emulator";
  }
}

// A failed assert() in a kernel is an error of that kernel, as on a GPU, and not the end of the process.
void __assert_fail(const char* expression, const char* file, unsigned line, const char*) noexcept {
  if (fastlm::emulator::running == nullptr) std::abort();
  fastlm::emulator::fail(std::string("assertion failed: ") + expression, file, static_cast<int>(line));
}
}
