// One launch copies up to MAX_BLOCKS blocks, each from its place in one KV cache to its place in another.
//
//   grid.y: the block        grid.x: a tile of UNROLL * blockDim.x units of it        threads: neighbouring units
//
// Compiled ahead to cuda_ipc_kernel.ptx (see cuda_ipc_kernel.py), which the driver translates for its GPU.

enum { MAX_BLOCKS = 500, UNROLL = 4 };

struct Batch {
    unsigned long long source;         // address of block 0's first byte to copy
    unsigned long long target;
    unsigned long long source_stride;  // bytes from block to block
    unsigned long long target_stride;
    unsigned long long num_units;      // per block
    unsigned int source_ids[MAX_BLOCKS];
    unsigned int target_ids[MAX_BLOCKS];
};

template <typename Unit> __device__ __forceinline__ void copy(const Batch &batch) {
    const Unit *source = (const Unit *)(batch.source + batch.source_ids[blockIdx.y] * batch.source_stride);
    Unit *target = (Unit *)(batch.target + batch.target_ids[blockIdx.y] * batch.target_stride);
    const unsigned long long step = blockDim.x;
    const unsigned long long first = blockIdx.x * step * UNROLL + threadIdx.x;
    Unit held[UNROLL];
#pragma unroll
    for (int turn = 0; turn < UNROLL; ++turn)
        if (first + turn * step < batch.num_units) held[turn] = source[first + turn * step];
#pragma unroll
    for (int turn = 0; turn < UNROLL; ++turn)
        if (first + turn * step < batch.num_units) target[first + turn * step] = held[turn];
}

extern "C" __global__ void copy_16(const __grid_constant__ Batch batch) { copy<uint4>(batch); }
extern "C" __global__ void copy_4(const __grid_constant__ Batch batch) { copy<unsigned int>(batch); }
extern "C" __global__ void copy_1(const __grid_constant__ Batch batch) { copy<unsigned char>(batch); }
