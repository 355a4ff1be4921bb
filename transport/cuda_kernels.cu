// Compiled ahead to cuda_kernels.ptx (see cuda_kernels.py), which the driver translates for its GPU.

// One launch copies up to MAX_BLOCKS blocks, each from its place in one KV cache to its place in another.
//
//   grid.y: the block        grid.x: a tile of UNROLL * blockDim.x units of it        threads: neighbouring units

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

// One launch adds up to MAX_SUMMED blocks to a digest (transport/device_digest.py has the formula), of which every thread
// has a part: sums[thread of the grid] grows by the words that it has read. Nobody else reads or writes there meanwhile.
//
//   grid.x: takes every NUM_TILES-th block        threads: neighbouring words of 8 bytes

enum { MAX_SUMMED = 1000 };

struct Summed {
    unsigned long long source;  // address of block 0's first byte
    unsigned long long stride;
    unsigned long long num_words;
    unsigned long long seed;  // of the first block; the next has one more
    unsigned long long sums;
    unsigned int num_blocks;
    unsigned int num_tiles;
    unsigned int ids[MAX_SUMMED];
};

__device__ __forceinline__ unsigned long long mix(unsigned long long word) {
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebull;
    return word ^ (word >> 31);
}

extern "C" __global__ void sum_words(const __grid_constant__ Summed what) {
    unsigned long long sum = 0;
    for (unsigned int block = blockIdx.x; block < what.num_blocks; block += what.num_tiles) {
        const unsigned long long *words = (const unsigned long long *)(what.source + what.ids[block] * what.stride);
        const unsigned long long seed = mix(what.seed + block);
#pragma unroll 8
        for (unsigned long long at = threadIdx.x; at < what.num_words; at += blockDim.x)
            sum += mix(words[at] ^ (seed + (at + 1) * 0x9e3779b97f4a7c15ull));
    }
    ((unsigned long long *)what.sums)[blockIdx.x * blockDim.x + threadIdx.x] += sum;
}
