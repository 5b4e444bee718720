// The Python module: the launchers of fastlm._C under the same names, run here, and what controls the emulator.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/bind.h"
#include "launchers.h"
#include "runtime.h"

namespace py = pybind11;
using namespace fastlm::emulator;

namespace {

void run_kernel(const std::string& name, std::array<unsigned, 3> grid, std::array<unsigned, 3> block,
                const py::bytes& params, size_t shared_bytes, bool opt_in) {
  const std::string_view bytes = params;
  const char* error = run_by_name(name, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                                  bytes.data(), bytes.size(), shared_bytes, opt_in);
  if (error != nullptr) throw std::runtime_error(error);
}

void configure(int schedule, uint64_t seed, bool eager, bool random_blocks, uintptr_t executor) {
  settings.schedule = static_cast<Settings::Schedule>(schedule);
  settings.seed = seed;
  settings.eager = eager;
  settings.random_blocks = random_blocks;
  settings.executor = reinterpret_cast<decltype(settings.executor)>(executor);
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  py::dict dtypes;
  for (int n = 0; n <= static_cast<int>(fastlm::DType::kFloat64); ++n) dtypes[fastlm::kDTypeNames[n]] = n;
  m.attr("DTYPES") = dtypes;
  fastlm::bind_cuda_launchers(m);
  m.def("run_kernel", &run_kernel);
  m.def("configure", &configure);
  m.def("kernel_name", [](uintptr_t kernel) { return kernel_name(reinterpret_cast<const void*>(kernel)); });
  m.def("base", &module_base);
#ifdef FASTLM_EMULATOR_TRACE
  m.def("forget_regions", &forget_regions);
  m.def("add_region", &add_region);
  m.def("regions", [] {
    py::list all;
    for (const Region& r : regions()) all.append(py::make_tuple(r.begin, r.bytes, r.writable, r.read, r.written));
    return all;
  });
  m.def("take_lines", [] {
    py::list all;
    for (const Line& l : take_lines()) {
      all.append(py::make_tuple(l.kernel, l.place, l.shared, static_cast<int>(l.access), l.width, l.requests, l.bytes,
                                l.sectors, l.ideal_sectors, l.wavefronts, l.ideal_wavefronts));
    }
    return all;
  });
#endif
}
