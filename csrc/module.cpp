// mi_kernels._C: facts about this build, and nothing else. The kernels are in libraries that do not depend on Python.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::list split(const char* text) { return py::str(text).attr("split")(); }

py::dict build_info() {
  py::dict info;
  info["mi_kernels"] = MI_VERSION;
  info["compiler"] = MI_COMPILER;
  info["build_type"] = MI_BUILD_TYPE;
  info["cxx_standard"] = MI_CXX_STANDARD;
  info["instruction_sets"] = split(MI_INSTRUCTION_SETS);
  info["cuda_architectures"] = split(MI_CUDA_ARCHITECTURES);
  info["torch"] = MI_TORCH_VERSION;
  info["torch_target"] = MI_TORCH_TARGET;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the build of mi_kernels.";
  m.def("build_info", &build_info, "Compiler, instruction sets, CUDA architectures and versions of this build.");
}
