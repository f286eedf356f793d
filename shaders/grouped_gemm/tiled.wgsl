// grouped_gemm, many rows: out[r, f] = activate(W[slot of r] rows[r / INPUT_DIVISOR]).
// One workgroup: TILE_M rows of one group x TILE_N rows of its packed matrix, 4 x 4 results an invocation.
// Rows come by index from tile_row, results go back to the same index: nothing is gathered or padded.
// Packed matrix: see span.wgsl; with PAIR = 2 its rows alternate gate and up and yield one feature.
// out: f32 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs
const TILE_N: u32 = 64u;
const TILE_K: u32 = 16u;
// A padded row length keeps the four quads of a column in different banks.
const STRIDE: u32 = 68u;
const_assert TILE_M == 64u;

var<workgroup> a_tile: array<f32, TILE_K * STRIDE>;
var<workgroup> b_tile: array<f32, TILE_K * STRIDE>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let tile = tile_of(workgroup.y);
    if tile.slot < 0 {
        return;
    }
    let span = span_of(u32(tile.slot));
    let first = span.row_begin + workgroup.x * TILE_N;
    if first >= span.row_end {
        return;
    }
    // This invocation stages four columns of one row of each operand.
    let staged = index / 4u;
    let quad = index % 4u;
    let has_input = staged < tile.count;
    let input = tile_row(tile.first + min(staged, tile.count - 1u)) / INPUT_DIVISOR * COLS;
    let matrix_row = min(first + staged, span.row_end - 1u);
    let codes = span.codes + (matrix_row - span.row_begin) * VECS_PER_ROW;
    let m = index / 16u * 4u;
    let n = index % 16u * 4u;
    var sums: array<vec4<f32>, 4>;
    for (var begin = 0u; begin < COLS; begin += TILE_K) {
        let col = begin + quad * 4u;
        for (var i = 0u; i < 4u; i++) {
            var value = 0.0;
            if has_input && col + i < COLS {
                value = input_value(input + col + i);
            }
            a_tile[(quad * 4u + i) * STRIDE + staged] = value;
        }
        var weights = vec4<f32>();
        if col < VECS_PER_ROW * WEIGHTS_PER_VEC {
            let words = segment[codes + col / WEIGHTS_PER_VEC];
            weights = weight_quad(words, col % WEIGHTS_PER_VEC / 4u) * weight_scale(span, matrix_row, col);
        }
        for (var i = 0u; i < 4u; i++) {
            b_tile[(quad * 4u + i) * STRIDE + staged] = weights[i];
        }
        workgroupBarrier();
        for (var k = 0u; k < TILE_K; k++) {
            let at = k * STRIDE + n;
            let b = vec4<f32>(b_tile[at], b_tile[at + 1u], b_tile[at + 2u], b_tile[at + 3u]);
            for (var i = 0u; i < 4u; i++) {
                sums[i] += a_tile[k * STRIDE + m + i] * b;
            }
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 4u; i++) {
        if m + i < tile.count {
            let row = tile_row(tile.first + m + i);
            for (var j = 0u; j < 4u; j += PAIR) {
                let result = first + n + j;
                if result < span.row_end {
                    let gate = sums[i][j] + row_bias(span, result);
                    let up = sums[i][j + PAIR - 1u] + row_bias(span, result + PAIR - 1u);
                    out[row * OUT_COLS + result / PAIR] = activate(gate, up);
                }
            }
        }
    }
}
