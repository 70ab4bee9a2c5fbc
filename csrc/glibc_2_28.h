// Lets a library that is built on a newer glibc load with glibc 2.28, which manylinux_2_28 asks for. The compiler's command line
// includes it before everything else (setup.py), since the functions are called by PyTorch's and the standard library's headers.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <features.h>
#endif

#if defined(__x86_64__) && defined(__GLIBC__)
// glibc 2.34 took these out of libdl and libpthread, and gave them a new version beside the old one. The functions are the same.
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver pthread_once, pthread_once@GLIBC_2.2.5");
__asm__(".symver pthread_rwlock_rdlock, pthread_rwlock_rdlock@GLIBC_2.2.5");
__asm__(".symver pthread_rwlock_unlock, pthread_rwlock_unlock@GLIBC_2.2.5");
__asm__(".symver pthread_rwlock_wrlock, pthread_rwlock_wrlock@GLIBC_2.2.5");

// std::shared_ptr counts without atomics where glibc 2.32 says that there is one thread. There always are several beside PyTorch.
extern "C" {
__attribute__((visibility("hidden"))) inline char __libc_single_threaded = 0;
}
#endif
