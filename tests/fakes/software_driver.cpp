// A CUDA driver in software, as strict as the documentation: device memory is host memory, a stream is a thread, and the
// kernels are the real ones, compiled for this machine. Only what transport/cuda_driver.py calls, and what a test needs
// to play the computation (software_*). Where CUDA's header is installed, every signature is checked against it.
//
// Strict: a call without a current context, of another process than the one that initialised, or on memory that was never
// allocated is refused; a handle is opened in other processes only, and counts its openings; what is copied when a kernel
// is launched is its argument, not a pointer to it.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#if __has_include(<cuda.h>)
#include <cuda.h>
#else
typedef int CUresult;
typedef int CUdevice;
typedef int CUpointer_attribute;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { char reserved[64]; } CUipcMemHandle;
#define CUDAAPI
#endif

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
struct uint3 { unsigned int x, y, z; };
struct alignas(16) uint4 { unsigned int x, y, z, w; };
static thread_local uint3 blockIdx, blockDim, threadIdx;
#include "../../transport/cuda_kernels.cu"

namespace {

constexpr int OK = 0, INVALID = 1, NOT_INITIALIZED = 3, NO_CONTEXT = 201, BAD_HANDLE = 400, NOT_READY = 600;
CUresult is(int code) { return static_cast<CUresult>(code); }

struct Event {
    std::atomic<unsigned long> recorded{0}, reached{0};
    bool has_reached(unsigned long at) const { return reached.load() >= at; }
};

struct Stream {
    std::mutex lock;
    std::condition_variable stir;
    std::deque<std::function<bool()>> work;  // true: done
    bool is_ending = false, is_held = false;
    std::thread thread{[this] { run(); }};

    void add(std::function<bool()> job) {
        std::lock_guard<std::mutex> guard(lock);
        work.push_back(std::move(job));
        stir.notify_all();
    }
    bool is_idle() {
        std::lock_guard<std::mutex> guard(lock);
        return work.empty();
    }
    void run() {
        std::unique_lock<std::mutex> guard(lock);
        while (!is_ending) {
            if (work.empty() || is_held) {
                stir.wait(guard);
                continue;
            }
            auto job = work.front();
            guard.unlock();
            bool is_done = job();
            guard.lock();
            if (is_done)
                work.pop_front();
            else
                stir.wait_for(guard, std::chrono::microseconds(100));
        }
    }
};

struct Memory {
    size_t size;
    int fd;
    bool is_ipc_capable;
    int device;
};
struct Handle {
    unsigned long magic;
    int pid, fd;
    unsigned long inode;
    size_t size;
};
struct Opened {
    std::string handle;
    size_t size;
    int count;
};

constexpr unsigned long MAGIC = 0xba70ba70;
std::mutex table;
std::map<CUdeviceptr, Memory> memories;
std::map<CUdeviceptr, Opened> opened;
std::map<void *, size_t> pinned;
size_t pinned_limit = 0;
std::set<Stream *> streams;
std::set<Event *> events;
std::atomic<int> owner_pid{0}, can_access_peer{1}, num_launches{0}, failure{0}, primary_uses{0};
thread_local std::vector<CUcontext> contexts;
char device_contexts[2];

bool is_alive() { return owner_pid == getpid(); }
CUresult ready() {
    if (!is_alive()) return is(NOT_INITIALIZED);
    if (failure) return is(failure);
    return contexts.empty() ? is(NO_CONTEXT) : is(OK);
}
std::map<CUdeviceptr, Memory>::iterator find(CUdeviceptr at) {
    auto found = memories.upper_bound(at);
    if (found == memories.begin()) return memories.end();
    --found;
    return at < found->first + found->second.size ? found : memories.end();
}
// A kernel, given its argument: what each thread of one launch does. The argument is copied, as CUDA does.
using Kernel = std::function<std::function<void()>(const void *)>;
template <typename Argument> Kernel kernel_of(void (*kernel)(const Argument)) {
    return [kernel](const void *argument) {
        auto copied = std::make_shared<Argument>(*static_cast<const Argument *>(argument));
        return [kernel, copied] { kernel(*copied); };
    };
}
void record(Event *event, std::vector<Stream *> behind) {
    auto at = ++event->recorded;
    auto left = std::make_shared<std::atomic<int>>(static_cast<int>(behind.size()));
    if (behind.empty()) event->reached = at;
    for (auto *stream : behind)
        stream->add([event, at, left] {
            if (--*left == 0) event->reached = at;
            return true;
        });
}

}  // namespace

extern "C" CUdeviceptr software_allocate(size_t size, int is_ipc_capable, int device);
extern "C" void software_free(CUdeviceptr at);

#define READY()                      \
    do {                             \
        auto code_ = ready();        \
        if (code_ != is(OK)) return code_; \
    } while (0)

extern "C" {

CUresult CUDAAPI cuInit(unsigned int flags) {
    int nobody = 0;
    owner_pid.compare_exchange_strong(nobody, getpid());
    return is(flags ? INVALID : is_alive() ? OK : NOT_INITIALIZED);
}
CUresult CUDAAPI cuGetErrorName(CUresult error, const char **name) {
    static thread_local std::string text;
    text = "CUDA_ERROR_" + std::to_string(static_cast<int>(error));
    *name = text.c_str();
    return is(OK);
}
CUresult CUDAAPI cuDeviceGetCount(int *count) {
    *count = 2;
    return is(is_alive() ? OK : NOT_INITIALIZED);
}
CUresult CUDAAPI cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    if (device < 0 || device > 1) return is(INVALID);
    memset(uuid->bytes, 0x40 + device, 16);
    return is(is_alive() ? OK : NOT_INITIALIZED);
}
CUresult CUDAAPI cuDeviceCanAccessPeer(int *can_access, CUdevice device, CUdevice peer) {
    *can_access = device != peer && can_access_peer;
    return is(OK);
}
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    if (!is_alive()) return is(NOT_INITIALIZED);
    ++primary_uses;
    *context = reinterpret_cast<CUcontext>(&device_contexts[device]);
    return is(OK);
}
CUresult CUDAAPI cuDevicePrimaryCtxRelease_v2(CUdevice) {
    --primary_uses;
    return is(OK);
}
CUresult CUDAAPI cuCtxPushCurrent_v2(CUcontext context) {
    if (!is_alive()) return is(NOT_INITIALIZED);
    contexts.push_back(context);
    return is(OK);
}
CUresult CUDAAPI cuCtxPopCurrent_v2(CUcontext *context) {
    if (contexts.empty()) return is(NO_CONTEXT);
    *context = contexts.back();
    contexts.pop_back();
    return is(OK);
}
CUresult CUDAAPI cuCtxRecordEvent(CUcontext context, CUevent event) {
    READY();
    std::lock_guard<std::mutex> guard(table);
    if (context != contexts.back() || !events.count(reinterpret_cast<Event *>(event))) return is(BAD_HANDLE);
    record(reinterpret_cast<Event *>(event), std::vector<Stream *>(streams.begin(), streams.end()));
    return is(OK);
}
CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image) {
    READY();
    std::string ptx(static_cast<const char *>(image));
    for (const char *part : {".version", ".entry copy_16(", ".entry copy_4(", ".entry copy_1(", "[4040]",
                             ".entry sum_words(", "[4048]"})
        if (ptx.find(part) == std::string::npos) return is(200);
    *module = reinterpret_cast<CUmodule>(new std::string(ptx));
    return is(OK);
}
CUresult CUDAAPI cuModuleUnload(CUmodule module) {
    READY();
    delete reinterpret_cast<std::string *>(module);
    return is(OK);
}
CUresult CUDAAPI cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
    READY();
    static const std::map<std::string, Kernel> kernels{
        {"copy_16", kernel_of(copy_16)}, {"copy_4", kernel_of(copy_4)}, {"copy_1", kernel_of(copy_1)},
        {"sum_words", kernel_of(sum_words)}};
    auto found = kernels.find(name);
    if (found == kernels.end()) return is(500);
    *function = reinterpret_cast<CUfunction>(const_cast<Kernel *>(&found->second));
    return is(OK);
}
CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx,
                                unsigned int by, unsigned int bz, unsigned int shared, CUstream stream,
                                void **arguments, void **extra) {
    READY();
    if (!gx || !gy || gy > 65535 || gz != 1 || bx > 1024 || by != 1 || bz != 1 || shared || extra) return is(INVALID);
    auto thread_of = (*reinterpret_cast<Kernel *>(function))(arguments[0]);
    ++num_launches;
    reinterpret_cast<Stream *>(stream)->add([=] {
        blockDim = {bx, 1, 1};
        for (unsigned int y = 0; y < gy; ++y)
            for (unsigned int x = 0; x < gx; ++x)
                for (unsigned int thread = 0; thread < bx; ++thread) {
                    blockIdx = {x, y, 0};
                    threadIdx = {thread, 0, 0};
                    thread_of();
                }
        return true;
    });
    return is(OK);
}
CUresult CUDAAPI cuStreamCreate(CUstream *stream, unsigned int) {
    READY();
    auto *made = new Stream();
    std::lock_guard<std::mutex> guard(table);
    streams.insert(made);
    *stream = reinterpret_cast<CUstream>(made);
    return is(OK);
}
CUresult CUDAAPI cuStreamDestroy_v2(CUstream handle) {
    if (contexts.empty()) return is(NO_CONTEXT);
    auto *stream = reinterpret_cast<Stream *>(handle);
    {
        std::lock_guard<std::mutex> guard(table);
        if (!streams.erase(stream)) return is(BAD_HANDLE);
    }
    {
        std::lock_guard<std::mutex> guard(stream->lock);
        stream->is_ending = true;
        stream->stir.notify_all();
    }
    stream->thread.join();
    delete stream;
    return is(OK);
}
CUresult CUDAAPI cuStreamQuery(CUstream stream) {
    READY();
    return is(reinterpret_cast<Stream *>(stream)->is_idle() ? OK : NOT_READY);
}
CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent handle, unsigned int flags) {
    READY();
    auto *event = reinterpret_cast<Event *>(handle);
    auto at = event->recorded.load();
    reinterpret_cast<Stream *>(stream)->add([event, at] { return event->has_reached(at); });
    return is(flags ? INVALID : OK);
}
CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned int flags) {
    READY();
    if (flags != 2) return is(INVALID);
    auto *made = new Event();
    std::lock_guard<std::mutex> guard(table);
    events.insert(made);
    *event = reinterpret_cast<CUevent>(made);
    return is(OK);
}
CUresult CUDAAPI cuEventDestroy_v2(CUevent handle) {
    auto *event = reinterpret_cast<Event *>(handle);
    std::lock_guard<std::mutex> guard(table);
    if (!events.erase(event)) return is(BAD_HANDLE);
    delete event;
    return is(OK);
}
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
    READY();
    std::lock_guard<std::mutex> guard(table);
    if (!streams.count(reinterpret_cast<Stream *>(stream))) return is(BAD_HANDLE);
    record(reinterpret_cast<Event *>(event), {reinterpret_cast<Stream *>(stream)});
    return is(OK);
}
CUresult CUDAAPI cuEventQuery(CUevent handle) {
    if (failure) return is(failure);
    auto *event = reinterpret_cast<Event *>(handle);
    std::lock_guard<std::mutex> guard(table);
    if (!events.count(event)) return is(BAD_HANDLE);
    return is(event->has_reached(event->recorded) ? OK : NOT_READY);
}
CUresult CUDAAPI cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr at) {
    if (!is_alive()) return is(NOT_INITIALIZED);
    std::lock_guard<std::mutex> guard(table);
    auto found = find(at);
    if (found == memories.end()) return is(INVALID);
    unsigned int value;
    switch (static_cast<int>(attribute)) {
        case 2: value = 2; break;
        case 9: value = found->second.device; break;
        case 10: value = found->second.is_ipc_capable; break;
        default: return is(INVALID);
    }
    memcpy(data, &value, static_cast<int>(attribute) == 10 ? 1 : 4);  // a boolean has one byte
    return is(OK);
}
CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr *at, size_t size) {
    READY();
    *at = software_allocate(size, 1, 0);
    return is(*at ? OK : 2);
}
CUresult CUDAAPI cuMemFree_v2(CUdeviceptr at) {
    READY();
    {
        std::lock_guard<std::mutex> guard(table);
        if (!memories.count(at)) return is(INVALID);
    }
    software_free(at);
    return is(OK);
}
CUresult CUDAAPI cuMemHostRegister_v2(void *at, size_t size, unsigned int flags) {
    READY();
    std::lock_guard<std::mutex> guard(table);
    if (flags != 3 || !size) return is(INVALID);
    if (pinned_limit && size > pinned_limit) return is(2);
    return is(pinned.emplace(at, size).second ? OK : 712);
}
CUresult CUDAAPI cuMemHostUnregister(void *at) {
    READY();
    std::lock_guard<std::mutex> guard(table);
    return is(pinned.erase(at) ? OK : 713);
}
CUresult CUDAAPI cuMemHostGetDevicePointer_v2(CUdeviceptr *result, void *at, unsigned int flags) {
    READY();
    std::lock_guard<std::mutex> guard(table);
    *result = reinterpret_cast<CUdeviceptr>(at);
    return is(!flags && pinned.count(at) ? OK : INVALID);
}
CUresult CUDAAPI cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr at) {
    READY();
    std::lock_guard<std::mutex> guard(table);
    auto found = find(at);
    if (found == memories.end()) return is(INVALID);
    *base = found->first;
    *size = found->second.size;
    return is(OK);
}
CUresult CUDAAPI cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr at) {
    READY();
    std::lock_guard<std::mutex> guard(table);
    auto found = memories.find(at);  // the base only
    if (found == memories.end() || !found->second.is_ipc_capable) return is(INVALID);
    struct stat status;
    fstat(found->second.fd, &status);
    Handle made{MAGIC, getpid(), found->second.fd, status.st_ino, found->second.size};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &made, sizeof made);
    return is(OK);
}
CUresult CUDAAPI cuIpcOpenMemHandle_v2(CUdeviceptr *at, CUipcMemHandle handle, unsigned int flags) {
    READY();
    Handle asked;
    memcpy(&asked, &handle, sizeof asked);
    if (flags != 1 || asked.magic != MAGIC) return is(INVALID);
    if (asked.pid == getpid()) return is(NO_CONTEXT);
    std::string key(reinterpret_cast<char *>(&asked), sizeof asked);
    std::lock_guard<std::mutex> guard(table);
    for (auto &each : opened)
        if (each.second.handle == key) {
            ++each.second.count;
            *at = each.first;
            return is(OK);
        }
    auto path = "/proc/" + std::to_string(asked.pid) + "/fd/" + std::to_string(asked.fd);
    int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    struct stat status {};
    if (fd < 0) return is(BAD_HANDLE);
    fstat(fd, &status);
    void *mapped = status.st_ino == asked.inode
                       ? mmap(nullptr, asked.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                       : MAP_FAILED;
    close(fd);
    if (mapped == MAP_FAILED) return is(BAD_HANDLE);
    *at = reinterpret_cast<CUdeviceptr>(mapped);
    opened[*at] = {key, asked.size, 1};
    return is(OK);
}
CUresult CUDAAPI cuIpcCloseMemHandle(CUdeviceptr at) {
    READY();
    std::lock_guard<std::mutex> guard(table);
    auto found = opened.find(at);
    if (found == opened.end()) return is(INVALID);
    if (--found->second.count == 0) {
        munmap(reinterpret_cast<void *>(at), found->second.size);
        opened.erase(found);
    }
    return is(OK);
}

// What a test does as the engine and the hardware.

CUdeviceptr software_allocate(size_t size, int is_ipc_capable, int device) {
    int fd = memfd_create("software-gpu", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(size))) return 0;
    void *mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) return 0;
    std::lock_guard<std::mutex> guard(table);
    memories[reinterpret_cast<CUdeviceptr>(mapped)] = {size, fd, is_ipc_capable != 0, device};
    return reinterpret_cast<CUdeviceptr>(mapped);
}
void software_free(CUdeviceptr at) {
    std::lock_guard<std::mutex> guard(table);
    munmap(reinterpret_cast<void *>(at), memories[at].size);
    close(memories[at].fd);
    memories.erase(at);
}
void *software_compute_stream() {
    auto *made = new Stream();
    std::lock_guard<std::mutex> guard(table);
    streams.insert(made);
    return made;
}
void software_hold(void *handle, int is_held) {
    auto *stream = static_cast<Stream *>(handle);
    std::lock_guard<std::mutex> guard(stream->lock);
    stream->is_held = is_held != 0;
    stream->stir.notify_all();
}
void software_end(void *handle) {
    contexts.push_back(nullptr);
    cuStreamDestroy_v2(static_cast<CUstream>(handle));
    contexts.pop_back();
}
void software_peer_access(int can_access) { can_access_peer = can_access; }
void software_pin_at_most(size_t size) { pinned_limit = size; }
void software_fail(int code) { failure = code; }
// What is left: 0 launches so far, 1 streams, 2 events, 3 opened memories, 4 retained contexts, 5 contexts of this thread,
// 6 pinned ranges, 7 memories.
int software_count(int what) {
    std::lock_guard<std::mutex> guard(table);
    int counts[] = {num_launches.load(),          static_cast<int>(streams.size()),
                    static_cast<int>(events.size()), static_cast<int>(opened.size()),
                    primary_uses.load(),          static_cast<int>(contexts.size()),
                    static_cast<int>(pinned.size()), static_cast<int>(memories.size())};
    return counts[what];
}

}  // extern "C"
