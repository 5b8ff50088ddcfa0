// What the compiler's headers ask of newer runtimes than those of manylinux_2_28 (glibc 2.28, libstdc++ of GCC 8) is
// defined here; the link exports nothing. A static libstdc++ would not do: exceptions leave these libraries, for torch
// to catch, and two copies of libstdc++ count those in flight apart.
#include <new>
#include <sstream>

#if defined(__linux__) && defined(__GLIBCXX__)

// glibc 2.32: whether std::shared_ptr may count without atomic operations. Not in a process with torch's threads.
extern "C" {
char __libc_single_threaded = 0;
}

namespace std {

// GCC 11
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// GCC 9 and 11: members that the headers declare to be in the library.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();
template basic_string<char> basic_stringbuf<char>::str() const&;
template basic_string<char> basic_stringbuf<char>::str() &&;

}  // namespace std
#endif
