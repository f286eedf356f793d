// grouped_gemm, many rows: out[r, f] = finish(W[slot of r] rows[r / INPUT_DIVISOR]).
// One workgroup: 64 rows of one group x TILE_N rows of its packed matrix, 4 x 4 results an invocation.
// Rows come by index from tile_row, results go back to the same index: nothing is gathered or padded.
// Packed matrix: see span.wgsl; with PAIR = 2 its rows alternate gate and up, FEATURE_ROWS of them yield a feature.
// Rows of codes (K_BLOCK > 0): one sum a K block, scaled, then added; else each weight is scaled as it is staged.
// out: f32 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs
const TILE_N: u32 = 64u;
const TILE_K: u32 = 16u;
const WEIGHTS_PER_WORD: u32 = WEIGHTS_PER_VEC / 4u;
// Quads of a staged column: 16 for 64 rows, and one more so that the columns begin in different banks.
const STRIDE: u32 = 17u;

// [column][quad of rows], both operands.
var<workgroup> a_tile: array<vec4<f32>, TILE_K * STRIDE>;
var<workgroup> b_tile: array<vec4<f32>, TILE_K * STRIDE>;

// One element of a packed matrix row, 0 beyond its last vector.
fn weight_at(span: Span, matrix_row: u32, col: u32) -> f32 {
    if col >= VECS_PER_ROW * WEIGHTS_PER_VEC {
        return 0.0;
    }
    let first = 4u * (span.codes + (matrix_row - span.row_begin) * VECS_PER_ROW);
    let weight = weight_one(segment_word(first + col / WEIGHTS_PER_WORD), col % WEIGHTS_PER_WORD);
    let scales = scale_row(span, matrix_row);
    let block = block_of(span, matrix_row, col);
    if BLOCK_SUMS {
        return weight - zero_at(scales, block);
    }
    return (weight - zero_at(scales, block)) * scale_at(scales, block) - min_at(scales, block);
}

// The scales of a K block: of four matrix rows, times that of an entering row.
fn block_scales(span: Span, result: u32, last_result: u32, col: u32) -> vec4<f32> {
    let block = block_of(span, result, col);
    return vec4<f32>(
        scale_at(scale_row(span, min(result, last_result)), block),
        scale_at(scale_row(span, min(result + 1u, last_result)), block),
        scale_at(scale_row(span, min(result + 2u, last_result)), block),
        scale_at(scale_row(span, min(result + 3u, last_result)), block),
    );
}

fn input_at(row: u32, wanted: bool, col: u32) -> f32 {
    if wanted && col < COLS {
        return weigh_input(row, input_value(row / INPUT_DIVISOR * INPUT_STRIDE + col));
    }
    return 0.0;
}

fn store(span: Span, row: u32, result: u32, values: vec4<f32>) {
    let token_scale = row_input_scale(row / INPUT_DIVISOR);
    for (var j = 0u; j < 4u; j += FEATURE_ROWS) {
        if result + j < span.row_end {
            let partner = result + j + FEATURE_ROWS - 1u;
            let gate_sum = values[j] * (row_scale(span, result + j) * token_scale);
            let up_sum = values[j + FEATURE_ROWS - 1u] * (row_scale(span, partner) * token_scale);
            let gate = add_delta(row, result + j, gate_sum) + row_bias(span, result + j);
            let up = add_delta(row, partner, up_sum) + row_bias(span, partner);
            let out_col = (result + j) / FEATURE_ROWS;
            out[row * OUT_COLS + out_col] = finish(row, out_col, gate, up);
        }
    }
}

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
    // This invocation stages one column of four rows of each operand; rows past the end repeat the last.
    let k = index % 16u;
    let quad = index / 16u;
    let at = quad * 4u;
    let last_row = tile.count - 1u;
    let x0 = tile_row(tile, tile.first + min(at, last_row));
    let x1 = tile_row(tile, tile.first + min(at + 1u, last_row));
    let x2 = tile_row(tile, tile.first + min(at + 2u, last_row));
    let x3 = tile_row(tile, tile.first + min(at + 3u, last_row));
    let last_result = span.row_end - 1u;
    let w0 = min(first + at, last_result);
    let w1 = min(first + at + 1u, last_result);
    let w2 = min(first + at + 2u, last_result);
    let w3 = min(first + at + 3u, last_result);
    // And computes four rows (of its quad) by four results (of its k).
    var sums0 = vec4<f32>();
    var sums1 = vec4<f32>();
    var sums2 = vec4<f32>();
    var sums3 = vec4<f32>();
    var total0 = vec4<f32>();
    var total1 = vec4<f32>();
    var total2 = vec4<f32>();
    var total3 = vec4<f32>();
    let result = first + k * 4u;
    for (var begin = 0u; begin < COLS; begin += TILE_K) {
        let col = begin + k;
        a_tile[k * STRIDE + quad] = vec4<f32>(
            input_at(x0, at < tile.count, col),
            input_at(x1, at + 1u < tile.count, col),
            input_at(x2, at + 2u < tile.count, col),
            input_at(x3, at + 3u < tile.count, col),
        );
        b_tile[k * STRIDE + quad] = vec4<f32>(
            weight_at(span, w0, col),
            weight_at(span, w1, col),
            weight_at(span, w2, col),
            weight_at(span, w3, col),
        );
        workgroupBarrier();
        for (var step = 0u; step < TILE_K; step++) {
            let a = a_tile[step * STRIDE + quad];
            let b = b_tile[step * STRIDE + k];
            sums0 += a.x * b;
            sums1 += a.y * b;
            sums2 += a.z * b;
            sums3 += a.w * b;
        }
        workgroupBarrier();
        if BLOCK_SUMS {
            if (begin + TILE_K) % K_BLOCK == 0u || begin + TILE_K >= COLS {
                let scales = block_scales(span, result, last_result, begin);
                total0 += sums0 * (scales * block_input_scale(x0 / INPUT_DIVISOR, begin));
                total1 += sums1 * (scales * block_input_scale(x1 / INPUT_DIVISOR, begin));
                total2 += sums2 * (scales * block_input_scale(x2 / INPUT_DIVISOR, begin));
                total3 += sums3 * (scales * block_input_scale(x3 / INPUT_DIVISOR, begin));
                sums0 = vec4<f32>();
                sums1 = vec4<f32>();
                sums2 = vec4<f32>();
                sums3 = vec4<f32>();
            }
        }
    }
    if BLOCK_SUMS {
        sums0 = total0;
        sums1 = total1;
        sums2 = total2;
        sums3 = total3;
    }
    if at < tile.count {
        store(span, x0, result, sums0);
    }
    if at + 1u < tile.count {
        store(span, x1, result, sums1);
    }
    if at + 2u < tile.count {
        store(span, x2, result, sums2);
    }
    if at + 3u < tile.count {
        store(span, x3, result, sums3);
    }
}
