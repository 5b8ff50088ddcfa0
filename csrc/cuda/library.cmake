# libmi_kernels_cuda.so: included by CMakeLists.txt where the CUDA kernels are wanted and MI_NVCC was found.
if(CMAKE_VERSION VERSION_LESS 3.26)  # older ones do not know how to ask nvcc for C++20
  message(FATAL_ERROR "CUDA kernels need CMake >= 3.26 (pip install cmake); FORCE_CUDA=0 leaves them out")
endif()
set(CMAKE_CUDA_COMPILER ${MI_NVCC})
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CUDA_ARCHITECTURES 80)  # for CMake's own trial of the compiler; the targets have theirs below
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "CUDA kernels need nvcc >= 12.4; ${MI_NVCC} is ${CMAKE_CUDA_COMPILER_VERSION}")
endif()

if(MI_CUDA_ARCHS STREQUAL "")
  set(MI_CUDA_ARCHS 80 89 90a)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND MI_CUDA_ARCHS 100 120)
  endif()
endif()
foreach(arch IN LISTS MI_CUDA_ARCHS)
  if(NOT arch MATCHES "^[0-9]+[af]?$")
    message(FATAL_ERROR "MI_CUDA_ARCHS: expected numbers such as 80;90a, got '${arch}'")
  endif()
  string(REGEX MATCH "^[0-9]+" number "${arch}")
  if(number LESS 80)
    message(FATAL_ERROR "MI_CUDA_ARCHS: the kernels need compute capability 8.0 or later, got '${arch}'")
  endif()
endforeach()
list(JOIN MI_CUDA_ARCHS " " MI_CUDA_ARCHITECTURES)

# Machine code for each; the newest portable one's PTX for later GPUs, and the oldest's for those between.
list(TRANSFORM MI_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE cuda_architectures)
set(portable_archs ${MI_CUDA_ARCHS})
list(FILTER portable_archs EXCLUDE REGEX "[af]$")
if(portable_archs)
  list(SORT portable_archs COMPARE NATURAL)
  list(GET portable_archs 0 oldest)
  list(GET portable_archs -1 newest)
  list(APPEND cuda_architectures "${oldest}-virtual" "${newest}-virtual")
  list(REMOVE_DUPLICATES cuda_architectures)
endif()

# sm90/*.cu use instructions that only 90a has and are compiled for it alone; everything else is compiled for every
# architecture. MI_HAVE_SM90 tells the host code whether they are there.
file(GLOB sm90_sources CONFIGURE_DEPENDS csrc/cuda/sm90/*.cu)
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*/*.cu csrc/cuda/*/*.cpp csrc/common/*.cpp)
list(REMOVE_ITEM cuda_sources ${sm90_sources})

add_library(mi_cuda_options INTERFACE)
target_link_libraries(mi_cuda_options INTERFACE mi_stable_abi)
target_include_directories(mi_cuda_options SYSTEM INTERFACE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(mi_cuda_options INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wno-unused-parameter,-Wno-psabi;--expt-relaxed-constexpr;-Xptxas=-warn-spills>")

list(TRANSFORM no_paths PREPEND "-Xcompiler=" OUTPUT_VARIABLE host_options)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND host_options --compress-mode=size)  # of the machine code in the library, which the driver unpacks
endif()
target_compile_options(mi_cuda_options INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:${host_options}>")

set_source_files_properties(csrc/cuda/host/interaction.cpp PROPERTIES
  COMPILE_DEFINITIONS MI_CUDA_ARCHITECTURES="${MI_CUDA_ARCHITECTURES}")
add_library(mi_cuda_all OBJECT ${cuda_sources})
target_link_libraries(mi_cuda_all PRIVATE mi_cuda_options)
set_target_properties(mi_cuda_all PROPERTIES CUDA_ARCHITECTURES "${cuda_architectures}")
set(cuda_objects $<TARGET_OBJECTS:mi_cuda_all>)
if("90a" IN_LIST MI_CUDA_ARCHS AND sm90_sources)
  add_library(mi_cuda_sm90 OBJECT ${sm90_sources})
  target_link_libraries(mi_cuda_sm90 PRIVATE mi_cuda_options)
  set_target_properties(mi_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  list(APPEND cuda_objects $<TARGET_OBJECTS:mi_cuda_sm90>)
  target_compile_definitions(mi_cuda_all PRIVATE MI_HAVE_SM90=1)
endif()

# The runtime is static (CMake's default), so that no particular libcudart has to be there; of libtorch_cuda
# nothing is linked (host/device_stream.cu).
add_library(mi_kernels_cuda MODULE ${cuda_objects})
target_link_libraries(mi_kernels_cuda PRIVATE mi_stable_abi ${torch_library} ${CMAKE_DL_LIBS})
target_link_options(mi_kernels_cuda PRIVATE -Wl,--exclude-libs,ALL)
set_target_properties(mi_kernels_cuda PROPERTIES
  LINKER_LANGUAGE CUDA CUDA_ARCHITECTURES "${cuda_architectures}" PREFIX lib SUFFIX .so)
