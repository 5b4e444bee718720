// The trace build: g++ calls the functions at the end of this file (the hooks of -fsanitize=thread, which this takes
// the place of) before every load and store of a kernel. Each is held against what may be accessed and what other
// threads have accessed without a barrier between, and counted with those of the other lanes of its warp.
//
// Two accesses are ordered if they are one thread's, lie in different launches, or if a barrier of the block, a named
// barrier or __syncwarp lies between; shuffles, votes and mma order nothing. Orders are kept as vector clocks (Flanagan
// and Freund, "FastTrack", PLDI 2009): time goes on at each synchronisation, and a thread knows of each other one up to
// which time it has seen what that did.
#include <algorithm>
#include <map>
#include <tuple>
#include <unordered_map>

#include "runtime.h"

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace fastlm {
namespace emulator {
namespace {

constexpr size_t kPageBytes = 4096, kSector = 32, kBank = 4;
constexpr int kBanks = 32;

struct Event {
  uint32_t block, time, place;  // number of the block among all that ever ran, and offset in the module; 0: none
  uint16_t thread;
};

// What is known of one byte.
struct Cell {
  Event write, read;               // the last of each
  bool initialised, atomic, many;  // the last write was atomic; there are more reads, in `reads`
  bool in_flight;
};

struct Page {
  Cell cells[kPageBytes];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number;
Page* last_page;                                          // of last_number, or null
std::unordered_map<uintptr_t, std::vector<Event>> reads;  // of bytes that several threads have read, all but the last
std::vector<Region> all_regions;

uint32_t now = 1, block_number = 0, first_block = 0;
uint32_t known_to_all = 0;  // up to when everything in this block is known to all its threads
std::vector<Clock> known;   // of each thread; empty if it knows no more than all

Cell& cell_at(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  if (last_page == nullptr || number != last_number) {
    std::unique_ptr<Page>& page = pages[number];
    if (page == nullptr) page = std::make_unique<Page>();
    last_page = page.get();
    last_number = number;
  }
  return last_page->cells[address % kPageBytes];
}

bool ordered(const Event& event, int thread) {
  if (event.block < first_block) return true;
  if (event.block != block_number) return false;
  return event.time <= known_to_all || event.thread == thread ||
         (!known[thread].empty() && event.time <= known[thread][event.thread]);
}

std::string where(uintptr_t address) {
  for (const Segment& segment : block.shared) {
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(segment.data);
    if (offset < segment.bytes) return "byte " + std::to_string(offset) + " of shared memory";
  }
  for (size_t n = 0; n < all_regions.size(); ++n) {
    const uintptr_t offset = address - all_regions[n].begin;
    if (offset < all_regions[n].bytes) return "byte " + std::to_string(offset) + " of tensor " + std::to_string(n);
  }
  return "a byte of no tensor";
}

// Where an address that belongs to nothing lies, seen from the nearest thing.
std::string beyond(uintptr_t address) {
  std::string nearest = "far from any tensor";
  uintptr_t least = 1 << 20;
  const auto compare = [&](uintptr_t begin, size_t bytes, const std::string& name) {
    const uintptr_t end = begin + bytes;
    const bool before = address < begin;
    const uintptr_t distance = before ? begin - address : address - end;
    if (distance >= least) return;
    least = distance;
    nearest = std::to_string(distance) + (before ? " bytes before " : " bytes past the end of ") + name;
  };
  for (const Segment& segment : block.shared) {
    compare(reinterpret_cast<uintptr_t>(segment.data), segment.bytes, "shared memory");
  }
  for (size_t n = 0; n < all_regions.size(); ++n) {
    compare(all_regions[n].begin, all_regions[n].bytes, "tensor " + std::to_string(n));
  }
  return nearest;
}

std::string described(const Event& event) {
  const unsigned x = blockDim.x, y = blockDim.y, n = event.thread;
  std::string text =
      "thread (" + std::to_string(n % x) + ", " + std::to_string(n / x % y) + ", " + std::to_string(n / x / y) + ")";
  if (event.block != block_number) text += " of another block";
  const uintptr_t place = reinterpret_cast<uintptr_t>(__ehdr_start) + event.place;
  const std::string stack = explain({place});
  return text + (stack.empty() ? "" : ", which was" + stack.substr(1, stack.find('\n') - 1) + ",");
}

[[noreturn]] void race(const char* what, uintptr_t address, const char* before, const Event& other) {
  fail(std::string("race: ") + what + " " + where(address) + ", which " + described(other) + " has " + before +
       ", with no barrier between");
}

void check_against_reads(uintptr_t address, Cell& cell, int thread, const char* what) {
  if (cell.read.block != 0 && !ordered(cell.read, thread)) race(what, address, "read", cell.read);
  if (cell.many) {
    for (const Event& read : reads[address]) {
      if (!ordered(read, thread)) race(what, address, "read", read);
    }
  }
}

void note_read(uintptr_t address, Cell& cell, const Event& read, int thread) {
  const bool same = cell.read.block == read.block && cell.read.thread == read.thread;
  if (!same && cell.read.block != 0 && !ordered(cell.read, thread)) {
    auto& others = reads[address];
    // Of the reads by other blocks of this launch one is as good as all: nothing that comes is ordered after it.
    if (cell.read.block != read.block) others.clear();
    if (others.size() >= 64) {
      others.erase(std::remove_if(others.begin(), others.end(),
                                  [](const Event& e) { return e.block == block_number && e.time <= known_to_all; }),
                   others.end());
    }
    others.push_back(cell.read);
    cell.many = true;
  } else if (!same && cell.many && cell.read.block != read.block) {
    reads.erase(address);
    cell.many = false;
  }
  cell.read = read;
}

void note_write(uintptr_t address, Cell& cell, const Event& write, bool atomic) {
  if (cell.many) reads.erase(address);
  cell.many = false;
  cell.read = {};
  cell.write = write;
  cell.atomic = atomic;
  cell.initialised = true;
}

Event event(uintptr_t place, const Thread& thread) {
  return {block_number, now, static_cast<uint32_t>(place - reinterpret_cast<uintptr_t>(__ehdr_start)),
          static_cast<uint16_t>(thread.number)};
}

const char* verb(Access access) {
  return access == Access::kLoad ? "reads" : access == Access::kAtomic ? "atomically updates" : "writes";
}

// One access of up to 16 bytes to memory that is known to be accessible.
void access_cells(uintptr_t address, size_t bytes, Access access, uintptr_t place, const Thread& thread,
                  bool initialised) {
  const Event mine = event(place, thread);
  for (uintptr_t at = address; at < address + bytes; ++at) {
    Cell& cell = cell_at(at);
    if (cell.in_flight) {
      fail(std::string(verb(access)) + " " + where(at) + ", to which " + described(cell.write) +
           " has a copy in flight");
    }
    const bool reads_it = access == Access::kLoad || access == Access::kAtomic;
    if (reads_it && !initialised && !cell.initialised)
      fail("reads " + where(at) + ", which nothing has been written to");
    const bool may_race = access != Access::kAtomic || !cell.atomic;
    if (may_race && cell.write.block != 0 && !ordered(cell.write, thread.number)) {
      race(verb(access), at, "written", cell.write);
    }
    if (access == Access::kLoad) {
      note_read(at, cell, mine, thread.number);
    } else {
      check_against_reads(at, cell, thread.number, verb(access));
      note_write(at, cell, mine, access == Access::kAtomic);
    }
  }
}

// Counting ---------------------------------------------------------------------------------------------------------

struct Request {
  uint32_t lanes = 0;
  uintptr_t address[kWarpLanes] = {};
};

struct Key {
  uintptr_t place;
  bool shared;
  Access access;
  int width;
  bool operator==(const Key& o) const {
    return place == o.place && shared == o.shared && access == o.access && width == o.width;
  }
};

struct Hash {
  size_t operator()(const Key& k) const {
    return k.place * 31 + static_cast<size_t>(k.width) * 8 + static_cast<size_t>(k.access) * 2 + k.shared;
  }
};

// The n-th time that each lane comes to an instruction is one request of the warp.
struct Instruction {
  uint32_t times[kWarpLanes] = {};
  std::vector<Request> requests;
};

std::unordered_map<Key, Instruction, Hash> instructions[kWarpLanes];  // of each warp
std::map<std::tuple<std::string, uintptr_t, bool, Access, int>, Line> lines;

Line& line_of(const Key& key) {
  Line& line = lines[{block.kernel, key.place, key.shared, key.access, key.width}];
  if (line.requests == 0) line = {block.kernel, key.place, key.shared, key.access, key.width, 0, 0, 0, 0, 0, 0};
  return line;
}

size_t distinct(std::vector<uintptr_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers.size();
}

// Adds the wavefronts of a part of a request: the most words that lie in one bank.
void count_wavefronts(Line& line, const uintptr_t* addresses, int count, int width) {
  std::vector<uintptr_t> words;
  for (int n = 0; n < count; ++n) {
    for (uintptr_t at = addresses[n] / kBank; at <= (addresses[n] + width - 1) / kBank; ++at) words.push_back(at);
  }
  if (words.empty()) return;
  const size_t all = distinct(words);
  uint64_t banks[kBanks] = {};
  for (const uintptr_t word : words) ++banks[word % kBanks];
  line.wavefronts += *std::max_element(std::begin(banks), std::end(banks));
  line.ideal_wavefronts += (all + kBanks - 1) / kBanks;
}

void count(const Key& key, const Request& request) {
  Line& line = line_of(key);
  ++line.requests;
  line.bytes += static_cast<uint64_t>(__builtin_popcount(request.lanes)) * key.width;
  if (key.shared) {
    const int lanes = key.width <= 4 ? 32 : key.width == 8 ? 16 : 8;  // of a part
    for (int first = 0; first < kWarpLanes; first += lanes) {
      uintptr_t addresses[kWarpLanes];
      int active = 0;
      for (int lane = first; lane < first + lanes; ++lane) {
        if (request.lanes >> lane & 1u) addresses[active++] = request.address[lane];
      }
      count_wavefronts(line, addresses, active, key.width);
    }
    return;
  }
  std::vector<uintptr_t> sectors, bytes;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if ((request.lanes >> lane & 1u) == 0) continue;
    for (int n = 0; n < key.width; ++n) {
      bytes.push_back(request.address[lane] + n);
      if (n == 0 || (request.address[lane] + n) % kSector == 0)
        sectors.push_back((request.address[lane] + n) / kSector);
    }
  }
  line.sectors += distinct(sectors);
  line.ideal_sectors += (distinct(bytes) + kSector - 1) / kSector;
}

void note_request(const Key& key, uintptr_t address, const Thread& thread) {
  Instruction& instruction = instructions[thread.warp][key];
  const uint32_t time = instruction.times[thread.lane]++;
  if (time >= instruction.requests.size()) instruction.requests.emplace_back();
  Request& request = instruction.requests[time];
  request.lanes |= 1u << thread.lane;
  request.address[thread.lane] = address;
}

bool contains(uintptr_t begin, size_t size, uintptr_t address, size_t bytes) {
  return address - begin < size && bytes <= size - (address - begin);
}

// What an access is to.
struct Place {
  bool checked = true, shared = false, initialised = false;
};

// Fails if it is to no memory of the kernel's.
Place locate(uintptr_t address, size_t bytes, bool writes) {
  const uintptr_t image = reinterpret_cast<uintptr_t>(__ehdr_start);
  if (on_a_stack(address) || contains(image, reinterpret_cast<uintptr_t>(_end) - image, address, bytes)) {
    return {false, false, true};
  }
  if (contains(reinterpret_cast<uintptr_t>(block.launch->params), block.launch->params_bytes, address, bytes)) {
    return {false, false, true};
  }
  if (shared_at(address, bytes) != nullptr) return {true, true, false};
  bool readable = false, writable = false, initialised = false;
  for (Region& region : all_regions) {
    if (!contains(region.begin, region.bytes, address, bytes)) continue;
    readable = true;
    writable = writable || region.writable;
    initialised = initialised || region.initialised;
    (writes ? region.written : region.read) += bytes;
  }
  const std::string what = std::string(writes ? "writes " : "reads ") + std::to_string(bytes) + " bytes ";
  if (!readable) fail("out of bounds: " + what + beyond(address));
  if (writes && !writable) fail(what + "of a tensor that it is only given to read: " + where(address));
  return {true, false, initialised};
}

void on_access(const void* p, size_t bytes, Access access, uintptr_t place) {
  const Thread* thread = current();
  if (thread == nullptr || thread->inside != 0) return;
  const Inside inside;
  trace_access(p, bytes, access, place, *thread);
}

}  // namespace

void trace_access(const void* p, size_t bytes, Access access, uintptr_t place, const Thread& thread) {
  uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const Place to = locate(address, bytes, access != Access::kLoad);
  if (!to.checked) return;
  for (const uintptr_t end = address + bytes; address < end;) {  // at most 16 bytes at a time, as a GPU does
    const size_t piece = std::min<size_t>(end - address, 16);
    if ((piece & (piece - 1)) != 0 || address % piece != 0) {
      fail("misaligned: an access of " + std::to_string(piece) + " bytes to " + where(address));
    }
    access_cells(address, piece, access, place, thread, to.initialised);
    note_request({place, to.shared, access, static_cast<int>(piece)}, address, thread);
    address += piece;
  }
}

void trace_launch() { first_block = block_number + 1; }

void trace_block() {
  ++block_number;
  known_to_all = now++;
  known.assign(block.threads, {});
}

void trace_shared(const Segment& segment) {
  const auto begin = reinterpret_cast<uintptr_t>(segment.data);
  for (uintptr_t at = begin; at < begin + segment.bytes; ++at) {
    if (cell_at(at).many) reads.erase(at);
    cell_at(at) = {};
  }
}

void trace_end_of_block() {
  for (int warp = 0; warp < kWarpLanes; ++warp) trace_requests(warp);
}

void trace_arrive(Clock& clock, int thread) {
  clock.resize(block.threads, known_to_all);
  if (!known[thread].empty()) {
    for (int n = 0; n < block.threads; ++n) clock[n] = std::max(clock[n], known[thread][n]);
  }
  clock[thread] = now++;
}

void trace_depart(const Clock& clock, int thread) {
  known[thread].resize(block.threads, known_to_all);
  for (int n = 0; n < block.threads; ++n) known[thread][n] = std::max(known[thread][n], clock[n]);
}

void trace_sync_block() { known_to_all = now++; }

void trace_requests(int warp) {
  for (auto& [key, instruction] : instructions[warp]) {
    for (const Request& request : instruction.requests) count(key, request);
  }
  instructions[warp].clear();
}

void trace_issue(const Copy& copy, uintptr_t place) {
  const Thread& thread = *current();
  const auto to = reinterpret_cast<uintptr_t>(copy.to), from = reinterpret_cast<uintptr_t>(copy.from);
  if (copy.bytes != 0) {
    const Place source = locate(from, copy.bytes, false);
    access_cells(from, copy.bytes, Access::kLoad, place, thread, source.initialised);
    note_request({place, source.shared, Access::kCopy, copy.bytes}, from, thread);
  }
  access_cells(to, copy.size, Access::kCopy, place, thread, true);
  note_request({place, true, Access::kCopy, copy.size}, to, thread);
  for (uintptr_t at = to; at < to + copy.size; ++at) cell_at(at).in_flight = true;
}

void trace_land(const Copy& copy) {
  const auto to = reinterpret_cast<uintptr_t>(copy.to);
  for (uintptr_t at = to; at < to + copy.size; ++at) {
    cell_at(at).in_flight = false;
    cell_at(at).write.time = now;
  }
}

void trace_ldmatrix(const void* const* rows, int matrices, uintptr_t place) {
  const Key key = {place, true, Access::kLoad, 16};
  const int first = current()->warp * kWarpLanes;
  Line& line = line_of(key);
  ++line.requests;
  for (int m = 0; m < matrices; ++m) {
    uintptr_t addresses[8];
    for (int row = 0; row < 8; ++row) {
      addresses[row] = reinterpret_cast<uintptr_t>(rows[8 * m + row]);
      Thread reader = *current();
      reader.number = first + 8 * m + row;
      access_cells(addresses[row], 16, Access::kLoad, place, reader, false);
      line.bytes += 16;
    }
    count_wavefronts(line, addresses, 8, 16);
  }
}

void forget_regions() {
  all_regions.clear();
  pages.clear();
  reads.clear();
  last_page = nullptr;
}

void add_region(uintptr_t address, size_t bytes, bool writable, bool initialised) {
  all_regions.push_back({address, bytes, writable, initialised, 0, 0});
}

const std::vector<Region>& regions() { return all_regions; }

std::vector<Line> take_lines() {
  std::vector<Line> taken;
  for (auto& [key, line] : lines) taken.push_back(line);
  lines.clear();
  return taken;
}

}  // namespace emulator
}  // namespace fastlm

// The hooks --------------------------------------------------------------------------------------------------------

using fastlm::emulator::Access;
#define FASTLM_CALLER (reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1)
#define FASTLM_HOOKS(bytes)                                                                                           \
  void __tsan_read##bytes(void* p) { fastlm::emulator::on_access(p, bytes, Access::kLoad, FASTLM_CALLER); }           \
  void __tsan_write##bytes(void* p) { fastlm::emulator::on_access(p, bytes, Access::kStore, FASTLM_CALLER); }         \
  void __tsan_unaligned_read##bytes(void* p) { fastlm::emulator::on_access(p, bytes, Access::kLoad, FASTLM_CALLER); } \
  void __tsan_unaligned_write##bytes(void* p) { fastlm::emulator::on_access(p, bytes, Access::kStore, FASTLM_CALLER); }

extern "C" {
FASTLM_HOOKS(1)
FASTLM_HOOKS(2)
FASTLM_HOOKS(4)
FASTLM_HOOKS(8)
FASTLM_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { fastlm::emulator::on_access(p, bytes, Access::kLoad, FASTLM_CALLER); }
void __tsan_write_range(void* p, size_t bytes) { fastlm::emulator::on_access(p, bytes, Access::kStore, FASTLM_CALLER); }
void __tsan_init() {}
}
