// y = x @ w.T on Hopper, persistent, with the communication of a tensor-parallel layer inside: this rank's rows go to the peers
// while they are multiplied, and tiles of a peer's rows wait for them (GATHER); or partial sums go to the rank that owns the
// rows, and are added there (REDUCE).
//
// gemm.py builds this file once for each configuration and puts the following in front:
//   FP8        x and w are e4m3 and not bf16
//   PRECISE    FP8 sums of 128 products are added in float32; else the tensor core's own sum is kept, which has fewer bits
//   BN         columns of a tile, a multiple of 32
//   STAGES     depth of the pipeline
//   PIECE      columns that a warpgroup stores at once, 32 or 64; more need registers
//   RING       buffers of each warpgroup for pieces of what it made; REDUCE: in which a peer's part of the sum came before
//   TURNS      the two warpgroups that multiply take tiles in turns, so that one stores what it made while the other multiplies;
//              else each has half of a tile's rows, and tiles can be larger
//   CLUSTER    1, or 2: two programs, one below the other, share the columns' tile of w
//   GATHER, REDUCE  all_gather_matmul, matmul_reduce_scatter; neither: a plain product
//   BUFFERS    of 4 KiB, through which GATHER sends
//   REGISTERS  of a thread that multiplies
//   mma(acc, a, b, add)  one wgmma of 64 x BN x 32 bytes, onto acc if `add`
//
// Roles, by warpgroup: 0 moves (warp 0: tiles of x and w come; warps 1 and 2: what warpgroups 1 and 2 made goes; warp 3 begins
// the transfer, then GATHER: this rank's rows go, REDUCE: the peers' partial sums come); 1 and 2 multiply: rows 0-63 and 64-127
// of a tile, or with TURNS all of every second tile. Rows of different ranks never share a tile. Warp 0 does nothing else: what
// holds up its loads for longer than the pipeline is deep holds up everyone.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>

constexpr int MAX_WORLD = 8, MAX_WEIGHTS = 4;
constexpr int BM = 128;         // rows of a tile, in blocks of 64: what wgmma multiplies
constexpr int BLOCKS = TURNS ? 2 : 1;     // of a tile, that a warpgroup multiplies
constexpr int MOVER_REGISTERS = 168 * 3 - REGISTERS * 2;  // of the others; the kernel starts with 168 for each of 384 threads
constexpr int ROW = 128;        // bytes of k in a tile: what a 128-byte swizzle spans
constexpr int BK = FP8 ? ROW : ROW / 2;
constexpr int A_BYTES = BM * ROW, B_BYTES = BN * ROW, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int PIECES = BN / PIECE, PIECE_BYTES = 64 * PIECE * 2, UNITS = PIECE / 8;  // units of 16 bytes in a row of a piece
constexpr int BUFFER = 4096;    // bytes
constexpr int COLUMNS_EACH = (BN + 127) / 128;  // of a tile, whose scales a thread loads
constexpr int BARRIERS = 2 * STAGES + 6 * RING + BUFFERS + 5;  // and room for the epoch, and for how many tiles have come
constexpr int SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + 2 * RING * PIECE_BYTES + BUFFERS * BUFFER + 8 * BARRIERS
    + 2 * BN * 4;  // scales of the columns, for each warpgroup
constexpr int TILE_BYTES = BM * BN * 2;  // REDUCE: of a tile as it waits to be fetched, piece by piece as in shared memory
constexpr int TILE_FLAGS = 2;   // REDUCE: one for each warp that sends a part of a tile; with TURNS the first is for all of it
constexpr int GROUP = 8;        // tiles of rows (of CLUSTER * BM) that take turns before the next columns: for the L2 cache
constexpr uint64_t AFTER_REPORT_NS = 5000000000ull;  // for the host to find a report and end the process

struct Params {
    CUtensorMap a_own, a_all;          // (1, m, k) and (world, m, k): this rank's rows of x, and all of them
    CUtensorMap b[MAX_WEIGHTS];        // (n, k)
    CUtensorMap c[MAX_WEIGHTS];        // (world, m, n) of each weight; REDUCE: (1, m, n) of this rank's rows
    char* sent[MAX_WORLD];             // REDUCE: this rank's memory, from where each rank fetches its tiles
    const char* partial[MAX_WORLD];    //   and each rank's, from where this one does
    const float* scale_own;            // of x: one, or one for each of this rank's m rows
    const float* scale_all;            //   likewise for all rows
    const float* scale_b[MAX_WEIGHTS]; // of w: one, or one for each of n columns
    const __nv_bfloat16* bias[MAX_WEIGHTS];
    char* rows_to[MAX_WORLD];          // GATHER: this source's rows on each rank, one after the other
    float* scales_to[MAX_WORLD];       //   and their scales
    const char* rows;                  //   from here, `stride` bytes apart
    int64_t stride;
    int row_bytes;
    int* flags_to[MAX_WORLD];          // this source's flags on each rank; GATHER: by unit; REDUCE: see flag_to
    const int* flags;                  // GATHER: [source * units + unit]; REDUCE: see flag_from
    const int* epoch;
    int *entered_to[MAX_WORLD], *last; // what begins a transfer, see triton/transfer.py
    unsigned long long* state;
    int64_t* report;
    uint64_t limit_ns;
    int n[MAX_WEIGHTS], n_tiles[MAX_WEIGHTS];
    int weights, world, rank, m, k_blocks, row_scales;  // row_scales: one for each row and each column
    int begins, gate, half, loopback, op;  // GATHER: this launch begins the transfer and sends; it waits
    int unit;                              //   rows that are sent under one flag, at most 8
    int ahead;                             // REDUCE: so many times as many of the others' tiles as are under way at once come first
};

// ---- barriers, flags, copies ----

__device__ __forceinline__ uint32_t shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_arrive_at(uint32_t bar, int program) {
    asm volatile("{ .reg .b32 at; mapa.shared::cluster.u32 at, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [at]; }"
                 :: "r"(bar), "r"(program) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
                 :: "r"(bar), "r"(parity) : "memory");
}

__device__ __forceinline__ int load_acquire(const int* flag) {
    int v;
    asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
    return v;
}
// What may be written while this kernel runs: not from the L1 cache.
__device__ __forceinline__ float load_late(const float* from) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ uint64_t now_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

__device__ __forceinline__ bool has_come(int seen, int epoch, bool later) { return later ? seen - epoch > 0 : seen == epoch; }

// Until the flag equals the epoch, or is later; then what was pushed before it may be read, by this thread's bulk copies too.
__device__ __noinline__ void wait_late(const Params& p, const int* flag, int epoch, int peer, int what, bool later) {
    uint64_t start = now_ns();
    int seen;
    while (!has_come(seen = load_acquire(flag), epoch, later)) {
        if (now_ns() - start < p.limit_ns) continue;
        volatile int64_t* report = p.report;
        report[1] = epoch, report[2] = what, report[3] = seen, report[4] = peer;
        __threadfence_system();
        report[0] = p.op;
        for (start = now_ns(); now_ns() - start < AFTER_REPORT_NS;) {}
        asm volatile("trap;");
    }
}
__device__ __forceinline__ void wait_flag(const Params& p, const int* flag, int epoch, int peer, int what, bool later = false) {
    if (!has_come(load_acquire(flag), epoch, later)) wait_late(p, flag, epoch, peer, what, later);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// The epoch of a transfer that this launch begins, once every peer has left the half. What triton/transfer.py's _begin does.
__device__ int begin(const Params& p) {
    const int before = *(volatile int*)(p.last + p.half);
    unsigned long long old;
    asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], 1;" : "=l"(old) : "l"(p.state) : "memory");
    const int epoch = old >> 32;
    if ((old & 0xFFFFFFFF) == gridDim.x - 1) {  // all have read what is changed here
        p.last[p.half] = p.last[2 + p.half] = epoch;
        atomicAdd(p.state, (1ull << 32) - gridDim.x);
    }
    if (p.loopback) return epoch;
    for (int r = 0; r < p.world; r++)
        if (blockIdx.x == 0 && r != p.rank)
            asm volatile("st.release.sys.global.b32 [%0], %1;" :: "l"(p.entered_to[r] + p.rank), "r"(epoch) : "memory");
    for (int r = 0; r < p.world; r++)
        if (r != p.rank) wait_flag(p, p.entered_to[p.rank] + r, before, r, -1, true);
    return epoch;
}

__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap& map, uint32_t bar, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(to), "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ __forceinline__ void load_tile_shared(uint32_t to, const CUtensorMap& map, uint32_t bar, int x, int y) {
    if (CLUSTER == 1)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                     :: "r"(to), "l"(&map), "r"(bar), "r"(x), "r"(y) : "memory");
    else  // on-chip: to both programs of the cluster
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4}], [%2], %5;"
                     :: "r"(to), "l"(&map), "r"(bar), "r"(x), "r"(y), "h"(static_cast<uint16_t>((1 << CLUSTER) - 1)) : "memory");
}
__device__ __forceinline__ void store_piece(const CUtensorMap& map, uint32_t from, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
                 :: "l"(&map), "r"(from), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ __forceinline__ void store_whole_piece(char* to, uint32_t from) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(to), "r"(from), "n"(PIECE_BYTES) : "memory");
}
__device__ __forceinline__ void load_whole_piece(uint32_t to, const char* from, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "n"(PIECE_BYTES), "r"(bar) : "memory");
}

// GATHER: what goes to a peer is stored by the lanes of a warp: bulk copies that wait for the wire would hold up those that feed
// the matmul, on the same engine. REDUCE: partial sums stay in this rank's memory, and their owner's bulk copies fetch them: stores
// to a peer would take instructions beside the products, and more than the wire takes hold up everyone's requests. Pieces lie there
// whole, as rows of 64 bytes take longer on the wire.
__device__ __forceinline__ uint4 load_shared(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
// Four 8x8 matrices of 16 bits, as wgmma has them in registers, a row of 16 bytes at each lane's address: four times fewer
// instructions than a word at a time. Whatever warps execute beside FP8 products takes register bandwidth from them.
__device__ __forceinline__ void store_matrices(uint32_t at, const uint32_t* v) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void store_global(char* to, uint4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" :: "l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Set a flag, by one lane: whoever acquires it sees what the warp stored before.
__device__ __forceinline__ void set_flag(int* flag, int epoch) {
    asm volatile("st.release.sys.global.b32 [%0], %1;" :: "l"(flag), "r"(epoch) : "memory");
}

#if GATHER
// One warp of each program sends units of rows to all peers, through buffers in shared memory, and then their flags.
__device__ void send(const Params& p, uint32_t buffers, uint32_t bars, int epoch, int lane) {
    uint32_t loads = 0;  // of all units: load i went to buffer i % BUFFERS
    for (int unit = blockIdx.x; unit * p.unit < p.m; unit += gridDim.x) {
        const int row = unit * p.unit, rows = min(p.unit, p.m - row), pieces = (p.row_bytes + BUFFER - 1) / BUFFER;
        const uint32_t first = loads;
        auto bytes = [&](int i) { return min(BUFFER, p.row_bytes - i % pieces * BUFFER); };
        auto load = [&](int i) {
            const uint32_t at = (first + i) % BUFFERS;
            if (lane == 0) {
                barrier_expect(bars + 8 * at, bytes(i));
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                             :: "r"(buffers + at * BUFFER), "l"(p.rows + (row + i / pieces) * p.stride + i % pieces * BUFFER),
                                "r"(bytes(i)), "r"(bars + 8 * at) : "memory");
            }
            loads++;
        };
        const int total = rows * pieces;
        for (int i = 0; i < min(BUFFERS, total); i++) load(i);
        for (int i = 0; i < total; i++) {
            const uint32_t n = first + i, from = buffers + n % BUFFERS * BUFFER;
            const int64_t to = (int64_t)(row + i / pieces) * p.row_bytes + i % pieces * BUFFER;
            barrier_wait(bars + 8 * (n % BUFFERS), n / BUFFERS & 1);
            #pragma unroll 4
            for (int at = lane * 16; at < bytes(i); at += 32 * 16) {
                const uint4 v = load_shared(from + at);
                for (int r = 0; r < p.world; r++)
                    if (r != p.rank) store_global(p.rows_to[r] + to + at, v);
            }
            __syncwarp();
            if (i + BUFFERS < total) load(i + BUFFERS);
        }
        if (p.row_scales && lane < rows)
            for (int r = 0; r < p.world; r++)
                if (r != p.rank) *(volatile float*)(p.scales_to[r] + row + lane) = p.scale_own[row + lane];
        __syncwarp();
        if (lane == 0)
            for (int r = 0; r < p.world; r++)
                if (r != p.rank) set_flag(p.flags_to[r] + unit, epoch);
    }
}
#endif

// ---- where a program's next tile is ----

struct Tile { int shard, row, weight, column, index; };  // row: of the shard, this program's first; index: in the shard

__device__ __forceinline__ int tiles_of_rows(const Params& p) { return (p.m + BM * CLUSTER - 1) / (BM * CLUSTER); }

// Tile t of all, of tm * tn for each shard, of which `step` are under way at once. A plain product and GATHER: this rank's own
// first, while the others' rows fly. REDUCE: its own in the order in which the peers send their part of them, but later, and the
// others' between them, so that there is something to send from the start to near the end: one by one, or if they are many by as
// many as are under way at once, for then every program has some of both kinds (1 to 2 % faster on two H200).
__device__ __forceinline__ Tile tile_at(const Params& p, int t, int tm, int tn, int step, int program) {
    const int each = tm * tn, peers = p.world - 1;
    int s = t / each, r = t % each;
    if (REDUCE && peers) {
        const int ahead = min(p.ahead * step / peers + 1, each), turn = t - ahead * peers;
        const int turns = each - ahead;
        const int run = turns > 4 * step ? max(step / peers, 1) : 1;  // of so many own, then as many of each peer's
        const int before = turn / (run * p.world) * run, most = min(run, turns - before), in = turn - before * p.world;
        int u = turn < 0 ? t : -1;       // which of the others'
        if (turn >= turns * p.world) r = turn - turns * peers;
        else if (turn >= 0 && in < most) r = before + in;
        else if (turn >= 0) u = (ahead + before) * peers + in - most;
        s = u < 0 ? 0 : 1 + u % peers;
        if (u >= 0) r = u / peers;
    }
    int first = r / (GROUP * tn) * GROUP, rows = min(tm - first, GROUP), in = r % (GROUP * tn);
    int pm = first + in % rows, pn = in / rows;
    Tile tile;
    tile.shard = (p.rank + s) % p.world;
    tile.row = (pm * CLUSTER + program) * BM;
    tile.weight = 0;
    tile.index = (pm * tn + pn) * CLUSTER + program;
    if (!REDUCE)
        while (pn >= p.n_tiles[tile.weight]) pn -= p.n_tiles[tile.weight++];
    tile.column = pn * BN;
    return tile;
}

// REDUCE: where the warp that sends what warpgroup `wg` made of a tile sets its flag, and where it is waited for on the tile's
// rank, if every source has so many tiles there.
__device__ __forceinline__ int* flag_to(const Params& p, const Tile& tile, int wg) {
    return p.flags_to[tile.shard] + TILE_FLAGS * tile.index + (TURNS ? 0 : wg);
}
__device__ __forceinline__ const int* flag_from(const Params& p, const Tile& tile, int wg, int source, int tiles) {
    return p.flags + TILE_FLAGS * (source * tiles + tile.index) + (TURNS ? 0 : wg);
}

// The tiles of a warp, every `apart`-th from t on. It looks 32 of them up at once, each lane one: a dozen divisions between a
// tile's loads and the next one's would hold them up.
struct Tiles {
    const Params& p;
    int t, apart, tm, tn, step, program, i;
    Tile found;

    __device__ __forceinline__ Tiles(const Params& p, int t, int apart, int tm, int tn, int step, int program)
        : p(p), t(t), apart(apart), tm(tm), tn(tn), step(step), program(program), i(0) {}

    __device__ __forceinline__ bool next(Tile& tile) {  // by all lanes
        if (t >= p.world * tm * tn) return false;
        if (i == 0) found = tile_at(p, t + threadIdx.x % 32 * apart, tm, tn, step, program);
        tile.shard = __shfl_sync(~0u, found.shard, i), tile.row = __shfl_sync(~0u, found.row, i);
        tile.weight = REDUCE ? 0 : __shfl_sync(~0u, found.weight, i), tile.column = __shfl_sync(~0u, found.column, i);
        tile.index = REDUCE ? __shfl_sync(~0u, found.index, i) : 0;
        i = (i + 1) % 32, t += apart;
        return true;
    }
};

// Byte of (row, column) in a piece, whose rows of PIECE bf16 are swizzled in units of 16 bytes
__device__ __forceinline__ uint32_t in_piece(int row, int unit) {
    return PIECE == 64 ? row * 128 + ((unit ^ (row & 7)) << 4) : row * 64 + ((unit ^ ((row >> 1) & 3)) << 4);
}

// Byte of piece i of a warpgroup's part of a tile, among the tiles that wait for their rank.
__device__ __forceinline__ int64_t waiting(const Tile& tile, int wg, int i) {
    return (int64_t)tile.index * TILE_BYTES + (TURNS ? i : wg * PIECES + i) * PIECE_BYTES;
}

__device__ __forceinline__ uint64_t matrix(uint32_t at) {  // K-major, 128-byte swizzle, 1024 bytes from 8 rows to the next
    return (uint64_t)((at & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&v);
}

__global__ void __launch_bounds__(384, 1) gemm(const __grid_constant__ Params p) {
    extern __shared__ uint8_t raw[];
    const uint32_t base = (shared(raw) + 1023) & ~1023u;
    const uint32_t pieces = base + STAGES * STAGE_BYTES;
    const uint32_t buffers = pieces + 2 * RING * PIECE_BYTES;
    const uint32_t bars = buffers + BUFFERS * BUFFER;
    auto full = [&](int s) { return bars + 8 * s; };
    auto empty = [&](int s) { return bars + 8 * (STAGES + s); };
    const uint32_t begun = bars + 8 * (BARRIERS - 3), epoch_at = begun + 8, arrived = epoch_at + 8;
    const uint32_t scales = bars + 8 * BARRIERS;
    auto epoch_begun = [&]() {
        barrier_wait(begun, 0);
        int epoch;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(epoch) : "r"(epoch_at));
        return epoch;
    };
    // Each warpgroup's buffers are used in turn, and every use goes round: the buffer is free; REDUCE: warp 3 has brought a peer's
    // part of the sum, or nothing if the tile goes to a peer; the warpgroup has made what goes, or of all but the last part only
    // read it; that has gone, and the buffer is free. A barrier's parity tells a phase from the next, not from the one after, so
    // each of them takes part in every use: who may skip one may also come two late, and would wait for ever.
    const uint32_t rings = bars + 8 * 2 * STAGES;
    auto free_ = [&](int wg, int i) { return rings + 8 * (wg * RING + i); };
    auto came = [&](int wg, int i) { return rings + 8 * ((2 + wg) * RING + i); };
    auto made = [&](int wg, int i) { return rings + 8 * ((4 + wg) * RING + i); };
    auto buffer_at = [&](int wg, int i) { return pieces + (wg * RING + i) * PIECE_BYTES; };
    const uint32_t sent = rings + 8 * 6 * RING, go = sent + 8 * BUFFERS;  // go: for each warpgroup, see TURNS below

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int program = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER;
    const int tm = tiles_of_rows(p);
    int tn = 0;
    for (int w = 0; w < p.weights; w++) tn += p.n_tiles[w];
    const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;

    if (threadIdx.x == 32)
        for (const CUtensorMap* map : {&p.a_own, &p.a_all, &p.b[0], &p.c[0]})
            asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full(s), 1), barrier_init(empty(s), (TURNS ? 1 : 2) * CLUSTER);
        for (int i = 0; i < 6 * RING; i++) barrier_init(rings + 8 * i, 1);
        for (int i = 0; i < BUFFERS; i++) barrier_init(sent + 8 * i, 1);
        for (int wg = 0; wg < 2; wg++) barrier_init(go + 8 * wg, 1);
        barrier_init(begun, 1);
        asm volatile("st.shared.b32 [%0], 0;" :: "r"(arrived) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
    else __syncthreads();

    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(MOVER_REGISTERS));
        const bool half = TURNS && (warp == 1 || warp == 2);  // of the tiles: its warpgroup's
        Tiles tiles(p, first + (half && warp == 2 ? step : 0), half ? 2 * step : step, tm, tn, step, program);
        Tile tile;
        if (warp == 0) {
            int stage = 0, gated = 0;
            uint32_t parity = 1;  // the first wait for a fresh stage passes
            while (tiles.next(tile)) {
                const bool own = !REDUCE && tile.shard == p.rank;
                if (lane == 0) {
                    if (GATHER && p.gate && !own) {
                        int seen;  // warp 3 reports a wait that takes too long
                        do asm volatile("ld.acquire.cta.shared.b32 %0, [%1];" : "=r"(seen) : "r"(arrived) : "memory");
                        while (seen <= gated);
                        gated++;
                        asm volatile("fence.proxy.async.global;" ::: "memory");
                    }
                    const CUtensorMap& a = own ? p.a_own : p.a_all;
                    const int shard = own ? 0 : tile.shard;
                    for (int kb = 0; kb < p.k_blocks; kb++) {
                        barrier_wait(empty(stage), parity);
                        const uint32_t to = base + stage * STAGE_BYTES;
                        barrier_expect(full(stage), STAGE_BYTES);
                        load_tile(to, a, full(stage), kb * BK, tile.row, shard);
                        load_tile_shared(to + A_BYTES + program * (B_BYTES / CLUSTER), p.b[tile.weight], full(stage), kb * BK,
                                         tile.column + program * (BN / CLUSTER));
                        if (++stage == STAGES) stage = 0, parity ^= 1;
                    }
                }
                __syncwarp();
            }
        } else if (warp == 1 || warp == 2) {
            // A warpgroup that multiplies must not wait for its stores to arrive, nor for the fence before a flag.
            const int wg = warp - 1, epoch = REDUCE ? epoch_begun() : 0;  // not before the peers' halves are free
            int buffer = 0, before = -1;  // before: the buffer whose store is under way beside the newest
            uint32_t parity = 0;
            auto next = [&]() {
                if (++buffer == RING) buffer = 0, parity ^= 1;
            };
            while (tiles.next(tile)) {
                const bool away = REDUCE && tile.shard != p.rank;
                for (int i = 0; i < BLOCKS * PIECES; i++) {
                    const int row = tile.row + (TURNS ? i / PIECES : wg) * 64, column = tile.column + i % PIECES * PIECE;
                    for (int read = REDUCE && !away ? p.world - 2 : 0; read > 0; read--) {
                        barrier_wait(made(wg, buffer), parity);
                        __syncwarp();
                        if (lane == 0) barrier_arrive(free_(wg, buffer));
                        next();
                    }
                    barrier_wait(made(wg, buffer), parity);
                    __syncwarp();  // no lane may miss a phase
                    const uint32_t from = buffer_at(wg, buffer);
                    if (lane == 0) {
                        if (row < p.m && column < p.n[tile.weight]) {
                            if (away) store_whole_piece(p.sent[tile.shard] + waiting(tile, wg, i), from);
                            else store_piece(p.c[tile.weight], from, column, row, REDUCE ? 0 : tile.shard);
                        }
                        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
                        const bool more = !REDUCE && i + 1 < BLOCKS * PIECES;  // parts of the next sum may need this buffer
                        if (more) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
                        else asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
                        if (before >= 0) barrier_arrive(free_(wg, before));
                        before = more ? buffer : -1;
                        if (!more) barrier_arrive(free_(wg, buffer));
                    }
                    next();
                }
                if (away && lane == 0) {
                    asm volatile("cp.async.bulk.wait_group 0; fence.proxy.async.global;" ::: "memory");
                    set_flag(flag_to(p, tile, wg), epoch);
                }
                __syncwarp();
            }
        } else if ((REDUCE || GATHER) && warp == 3) {
            int epoch = 0;
            if (lane == 0 && !p.begins) epoch = *p.epoch;
            if (lane == 0 && p.begins) {
                epoch = begin(p);
                asm volatile("st.shared.b32 [%0], %1;" :: "r"(epoch_at), "r"(epoch) : "memory");
                barrier_arrive(begun);
            }
            epoch = __shfl_sync(~0u, epoch, 0);
#if GATHER
            if (p.begins) send(p, buffers, sent, epoch, lane);
            const int units = (p.m + p.unit - 1) / p.unit;
            for (int gated = 0; p.gate && tiles.next(tile);) {
                if (tile.shard == p.rank) continue;
                const int end = min(units, (tile.row + BM) / p.unit);
                for (int unit = tile.row / p.unit + lane; unit < end; unit += 32)
                    wait_flag(p, p.flags + tile.shard * units + unit, epoch, tile.shard, unit);
                __syncwarp();
                gated++;
                if (lane == 0) asm volatile("st.release.cta.shared.b32 [%0], %1;" :: "r"(arrived), "r"(gated) : "memory");
            }
#endif
            int buffer[2] = {}, turn = 0;  // of each warpgroup
            uint32_t parity[2] = {1, 1};
            while (REDUCE && tiles.next(tile)) {
                const int whose = TURNS ? turn++ % 2 : 0;
                const int peers = tile.shard == p.rank ? p.world - 1 : 1;
                for (int use = 0; lane == 0 && use < BLOCKS * PIECES * peers; use++) {
                    const int i = use / peers, peer = use % peers, source = peer + (peer >= p.rank);
                    for (int wg = whose; wg <= (TURNS ? whose : 1); wg++) {
                        const int row = tile.row + (TURNS ? i / PIECES : wg) * 64, column = tile.column + i % PIECES * PIECE;
                        const uint32_t bar = came(wg, buffer[wg]);
                        barrier_wait(free_(wg, buffer[wg]), parity[wg]);
                        if (tile.shard == p.rank && i == 0)
                            wait_flag(p, flag_from(p, tile, wg, source, tm * tn * CLUSTER), epoch, source, tile.index);
                        if (tile.shard == p.rank && row < p.m && column < p.n[0]) {
                            barrier_expect(bar, PIECE_BYTES);
                            load_whole_piece(buffer_at(wg, buffer[wg]), p.partial[source] + waiting(tile, wg, i), bar);
                        } else {
                            barrier_arrive(bar);
                        }
                        if (++buffer[wg] == RING) buffer[wg] = 0, parity[wg] ^= 1;
                    }
                }
                __syncwarp();
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
        const int wg = warp / 4 - 1;
        const int me = threadIdx.x % 128;
        const bool elected = me == 0;
        const int own_row = warp % 4 * 16 + lane / 4;  // and that + 8, of a block's 64
        int stage = 0, buffer = 0;
        uint32_t here = buffer_at(wg, 0) + in_piece(warp % 4 * 16 + lane % 16, lane / 16);  // a row's unit, see store_matrices
        uint32_t was_free = free_(wg, 0);                                                   // and the buffer's first barrier
        const uint32_t my_scales = scales + 4 * (wg * BN);
        uint32_t parity = 0, buffer_parity = 0, go_parity = wg ^ 1;  // warpgroup 0 begins
        auto next = [&]() {
            here += PIECE_BYTES, was_free += 8;
            if (++buffer == RING) buffer = 0, buffer_parity ^= 1, here -= RING * PIECE_BYTES, was_free -= 8 * RING;
        };
        auto release = [&](int of) {
            if (of < 0 || !elected) return;
            if (CLUSTER == 1) barrier_arrive(empty(of));
            else for (int i = 0; i < CLUSTER; i++) barrier_arrive_at(empty(of), i);
        };
        auto skip = [&]() {  // the other's tile
            stage += p.k_blocks;
            parity ^= stage / STAGES & 1;
            stage %= STAGES;
        };
        if (TURNS && wg) skip();
        Tiles tiles(p, first + (TURNS ? wg * step : 0), (TURNS ? 2 : 1) * step, tm, tn, step, program);
        Tile tile;
        while (tiles.next(tile)) {
            const bool own = tile.shard == p.rank;
            const int n = p.n[tile.weight];
            float column_scale[COLUMNS_EACH];
            if (FP8 && p.row_scales)
                for (int i = 0; i < COLUMNS_EACH; i++) {
                    const int column = tile.column + i * 128 + me;
                    column_scale[i] = column < n ? __ldg(p.scale_b[tile.weight] + column) : 0.f;
                }
            float acc[BLOCKS][BN / 2];
            if (PRECISE)
                for (int h = 0; h < BLOCKS; h++)
                    for (int i = 0; i < BN / 2; i++) acc[h][i] = 0.f;
            int last = -1;
            if (TURNS) {  // not to pass by the other's uses of a stage
                barrier_wait(go + 8 * wg, go_parity);
                go_parity ^= 1;
            }
            for (int kb = 0; kb < p.k_blocks; kb++) {
                barrier_wait(full(stage), parity);
                const uint64_t a = matrix(base + stage * STAGE_BYTES + (TURNS ? 0 : wg * (64 * ROW)));
                const uint64_t b = matrix(base + stage * STAGE_BYTES + A_BYTES);
                constexpr int NEXT_BLOCK = 64 * ROW >> 4;  // of a, as `matrix` counts
                if (PRECISE) {
                    float sum[BLOCKS][BN / 2];
                    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                    #pragma unroll
                    for (int h = 0; h < BLOCKS; h++)
                        for (int i = 0; i < 4; i++) mma(sum[h], a + h * NEXT_BLOCK + 2 * i, b + 2 * i, i);
                    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
                    #pragma unroll
                    for (int h = 0; h < BLOCKS; h++)
                        for (int i = 0; i < BN / 2; i++) asm volatile("" : "+f"(sum[h][i]) :: "memory");
                    last = stage;
                    #pragma unroll
                    for (int h = 0; h < BLOCKS; h++)
                        for (int i = 0; i < BN / 2; i++) acc[h][i] += sum[h][i];
                } else {
                    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        #pragma unroll
                        for (int h = 0; h < BLOCKS; h++) mma(acc[h], a + h * NEXT_BLOCK + 2 * i, b + 2 * i, kb | i);
                    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                    if (kb) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                }
                release(last);
                last = PRECISE ? -1 : stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            if (TURNS) {
                if (elected) barrier_arrive(go + 8 * (wg ^ 1));
                skip();
            }
            const float tensor_scale = FP8 && !p.row_scales ? __ldg(p.scale_own) * __ldg(p.scale_b[tile.weight]) : 1.f;
            float scale[BLOCKS][2];
            auto load_scales = [&]() {  // of rows; a peer's came before its rows
                for (int h = 0; h < BLOCKS; h++)
                    for (int j = 0; j < 2; j++) {
                        const int row = tile.row + (TURNS ? h : wg) * 64 + own_row + 8 * j;
                        scale[h][j] = tensor_scale;
                        if (FP8 && p.row_scales && row < p.m)
                            scale[h][j] = load_late(own && !REDUCE ? p.scale_own + row
                                                                   : p.scale_all + (int64_t)tile.shard * p.m + row);
                    }
            };
            // They come while the last products are made. In turns the other warpgroup multiplies meanwhile, and what is loaded
            // beside one's own products spills registers: on an H200, tiles of 128 columns took 1.3 to 2.7 % longer with that.
            if (!TURNS) load_scales();
            if (FP8 && p.row_scales) {
                for (int i = 0; i < COLUMNS_EACH; i++)
                    if (i * 128 + me < BN)
                        asm volatile("st.shared.f32 [%0], %1;"
                                     :: "r"(my_scales + 4 * (i * 128 + me)), "f"(column_scale[i]) : "memory");
                asm volatile("bar.sync %0, 128;" :: "r"(wg + 1) : "memory");
            }
            if (!PRECISE) {
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                #pragma unroll
                for (int h = 0; h < BLOCKS; h++)
                    for (int i = 0; i < BN / 2; i++) asm volatile("" : "+f"(acc[h][i]) :: "memory");
                release(last);
            }
            if (TURNS) load_scales();

            // y = acc * scale(row) * scale(column) + bias
            const __nv_bfloat16* bias = p.bias[tile.weight];
            #pragma unroll
            for (int piece = 0; piece < BLOCKS * PIECES; piece++) {
                const int h = piece / PIECES, i = piece % PIECES;
                float y[PIECE / 2];
                #pragma unroll
                for (int j = 0; j < PIECE / 2; j++) y[j] = acc[h][i * (PIECE / 2) + j] * scale[h][j / 2 % 2];
                const int first = tile.column + i * PIECE + lane % 4 * 2;
                if (FP8 && p.row_scales)
                    #pragma unroll
                    for (int j = 0; j < PIECE / 8; j++) {
                        float2 by;
                        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(by.x), "=f"(by.y)
                                     : "r"(my_scales + 4 * (i * PIECE + lane % 4 * 2 + j * 8)) : "memory");
                        y[j * 4] *= by.x, y[j * 4 + 1] *= by.y, y[j * 4 + 2] *= by.x, y[j * 4 + 3] *= by.y;
                    }
                if (bias != nullptr)
                    #pragma unroll
                    for (int j = 0; j < PIECE / 8; j++)
                        if (first + j * 8 < n) {
                            const float2 plus = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(bias + first + j * 8));
                            y[j * 4] += plus.x, y[j * 4 + 1] += plus.y, y[j * 4 + 2] += plus.x, y[j * 4 + 3] += plus.y;
                        }
                uint32_t rounded[PIECE / 4];  // of row, row + 8, in turns
                #pragma unroll
                for (int j = 0; j < PIECE / 4; j++) rounded[j] = pack(y[2 * j], y[2 * j + 1]);
                auto at = [&](int j) { return here ^ j / 2 << 4; };  // of the units of rounded[j] to rounded[j + 3]
                if (REDUCE && own && p.world == 2) {  // one rounding, as that of a float32 sum: it has more than twice the bits
                    barrier_wait(was_free + 8 * 2 * RING, buffer_parity);
                    #pragma unroll
                    for (int j = 0; j < PIECE / 4; j += 4) {
                        uint32_t v[4];
                        load_matrices(v, at(j));
                        #pragma unroll
                        for (int i = 0; i < 4; i++)
                            asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(rounded[j + i]) : "r"(rounded[j + i]), "r"(v[i]));
                    }
                } else if (REDUCE && own) {  // the ranks' partial sums, each rounded as it was sent, in rank order
                    float sum[PIECE / 2];
                    #pragma unroll
                    for (int j = 0; j < PIECE / 2; j++) sum[j] = -0.f;  // which leaves the first term as it is
                    for (int source = 0, peer = 0; source < p.world; source++) {
                        const bool from_here = source == p.rank;
                        if (!from_here) {
                            if (peer++) {  // all have read what came before
                                asm volatile("bar.sync %0, 128;" :: "r"(wg + 1) : "memory");
                                if (elected) barrier_arrive(was_free + 8 * 4 * RING);
                                next();
                            }
                            barrier_wait(was_free + 8 * 2 * RING, buffer_parity);
                        }
                        #pragma unroll
                        for (int j = 0; j < PIECE / 4; j += 4) {
                            uint32_t v[4];
                            if (!from_here) load_matrices(v, at(j));
                            #pragma unroll
                            for (int i = 0; i < 4; i++) {
                                const uint32_t two = from_here ? rounded[j + i] : v[i];
                                sum[2 * (j + i)] += __uint_as_float(two << 16);
                                sum[2 * (j + i) + 1] += __uint_as_float(two & 0xFFFF0000u);
                            }
                        }
                    }
                    #pragma unroll
                    for (int j = 0; j < PIECE / 4; j++) rounded[j] = pack(sum[2 * j], sum[2 * j + 1]);
                } else {
                    barrier_wait(REDUCE ? was_free + 8 * 2 * RING : was_free, buffer_parity ^ !REDUCE);
                }
                #pragma unroll
                for (int j = 0; j < PIECE / 4; j += 4) store_matrices(at(j), rounded + j);
                asm volatile("fence.proxy.async.shared::cta; bar.sync %0, 128;" :: "r"(wg + 1) : "memory");
                if (elected) barrier_arrive(was_free + 8 * 4 * RING);
                next();
            }
        }
    }
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

// ---- host ----

// What gemm.py passes: all addresses on the device; strides in bytes.
struct Call {
    void *a_own, *a_all;
    void *b[MAX_WEIGHTS], *c[MAX_WEIGHTS], *sent[MAX_WORLD], *partial[MAX_WORLD];
    void *scale_own, *scale_all, *scale_b[MAX_WEIGHTS], *bias[MAX_WEIGHTS], *rows_to[MAX_WORLD], *scales_to[MAX_WORLD];
    void *flags_to[MAX_WORLD], *entered_to[MAX_WORLD];
    void *flags, *epoch, *last, *state, *report;
    int64_t limit_ns, k, own_stride, all_stride, b_stride[MAX_WEIGHTS];
    int n[MAX_WEIGHTS], weights, world, rank, m, row_scales, begins, gate, half, loopback, unit, ahead, op, programs;
};

typedef CUresult (*Encode)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                           const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static Encode encode;

static int describe(CUtensorMap* map, bool fp8, int dims, void* at, int64_t x, int64_t y, int64_t z, int64_t row_bytes, int box_x,
                    int box_y, bool wide) {
    const cuuint64_t size[3] = {(cuuint64_t)x, (cuuint64_t)y, (cuuint64_t)z};
    const cuuint64_t stride[2] = {(cuuint64_t)row_bytes, (cuuint64_t)(row_bytes * y)};
    const cuuint32_t box[3] = {(cuuint32_t)box_x, (cuuint32_t)box_y, 1}, each[3] = {1, 1, 1};
    return encode(map, fp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, dims, at, size, stride, box, each,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, wide ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// 0, or 1000 + the driver's error of a tensor map, or the runtime's error
extern "C" int launch(const Call* call, void* stream) {
    if (encode == nullptr) {
        cudaDriverEntryPointQueryResult found;
        cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000, cudaEnableDefault, &found);
        if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return error ? error : cudaErrorSymbolNotFound;
        error = cudaFuncSetAttribute(gemm, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
        if (error != cudaSuccess) return encode = nullptr, error;
    }
    Params p = {};
    int e = 0;
    const Call& c = *call;
    e |= describe(&p.a_own, FP8, 3, c.a_own, c.k, c.m, 1, c.own_stride, BK, BM, true);
    e |= describe(&p.a_all, FP8, 3, c.a_all, c.k, c.m, c.world, c.all_stride, BK, BM, true);
    for (int w = 0; w < c.weights; w++) {
        e |= describe(&p.b[w], FP8, 2, c.b[w], c.k, c.n[w], 1, c.b_stride[w], BK, BN / CLUSTER, true);
        if (!REDUCE) e |= describe(&p.c[w], false, 3, c.c[w], c.n[w], c.m, c.world, 2ll * c.n[w], PIECE, 64, PIECE == 64);
        p.scale_b[w] = (const float*)c.scale_b[w], p.bias[w] = (const __nv_bfloat16*)c.bias[w];
        p.n[w] = c.n[w], p.n_tiles[w] = (c.n[w] + BN - 1) / BN;
    }
    if (REDUCE) {
        e |= describe(&p.c[0], false, 3, c.c[0], c.n[0], c.m, 1, 2ll * c.n[0], PIECE, 64, PIECE == 64);
        for (int r = 0; r < c.world; r++) p.sent[r] = (char*)c.sent[r], p.partial[r] = (const char*)c.partial[r];
    }
    if (e) return 1000 + e;
    p.scale_own = (const float*)c.scale_own, p.scale_all = (const float*)c.scale_all;
    p.flags = (const int*)c.flags, p.epoch = (const int*)c.epoch, p.report = (int64_t*)c.report, p.limit_ns = c.limit_ns;
    p.weights = c.weights, p.world = c.world, p.rank = c.rank, p.m = c.m, p.k_blocks = (c.k + BK - 1) / BK;
    p.row_scales = c.row_scales, p.begins = c.begins, p.gate = c.gate, p.op = c.op;
    p.rows = (const char*)c.a_own, p.stride = c.own_stride, p.row_bytes = c.k * (FP8 ? 1 : 2);
    p.last = (int*)c.last, p.state = (unsigned long long*)c.state, p.half = c.half, p.loopback = c.loopback;
    p.unit = c.unit, p.ahead = c.ahead;
    for (int r = 0; r < c.world && r < MAX_WORLD; r++) {
        p.rows_to[r] = (char*)c.rows_to[r], p.scales_to[r] = (float*)c.scales_to[r];
        p.flags_to[r] = (int*)c.flags_to[r], p.entered_to[r] = (int*)c.entered_to[r];
    }

    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = CLUSTER, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(c.programs / CLUSTER * CLUSTER), config.blockDim = dim3(384), config.dynamicSmemBytes = SHARED_BYTES;
    config.stream = (cudaStream_t)stream, config.attrs = &cluster, config.numAttrs = 1;
    static int clusters = 0;  // that are on the device at once: who waits for a peer must not keep the one out that it waits for
    if (clusters == 0) {
        cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, gemm, &config);
        if (error != cudaSuccess) return error;
    }
    config.gridDim.x = config.gridDim.x < clusters * CLUSTER ? config.gridDim.x : clusters * CLUSTER;
    return cudaLaunchKernelEx(&config, gemm, p);
}
