// Counts parallel regions: a library that suites/processes.py preloads into a measured process. MI_LIBGOMP is the path
// of the OpenMP library that the process has.
#include <dlfcn.h>

#include <cstdlib>

extern "C" {

int mi_parallel_regions = 0;

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  using Parallel = void(void (*)(void*), void*, unsigned, unsigned);
  static auto* const parallel =
      reinterpret_cast<Parallel*>(dlsym(dlopen(std::getenv("MI_LIBGOMP"), RTLD_NOW), "GOMP_parallel"));
  ++mi_parallel_regions;
  parallel(body, data, threads, flags);
}
}
