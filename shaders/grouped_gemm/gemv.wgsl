// grouped_gemm, few rows: out[r, f] = finish(W[slot_of(r)] rows[r / INPUT_DIVISOR]).
// One workgroup: TILE_ROWS rows of one packed matrix for one row r. LANES invocations share four matrix rows.
// Packed matrix: see span.wgsl; with PAIR = 2 its rows alternate gate and up, FEATURE_ROWS of them yield a feature.
// out: f32 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs
const QUADS: u32 = WEIGHTS_PER_VEC / 4u;
const STAGE_VECS: u32 = STAGE_QUADS / QUADS;
// A run of vectors is summed before its scale acts: one vector, or those of a K block of quantised rows.
const STAGE_RUNS: u32 = STAGE_VECS / VECS_PER_RUN;
const_assert TILE_ROWS * LANES == 4u * WORKGROUP_SIZE;
const_assert TILE_ROWS % PAIR == 0u;
const_assert STAGE_RUNS * VECS_PER_RUN == STAGE_VECS;
// A vector of two scales is a run of its own; its halves are summed apart.
const_assert SCALES_PER_VEC == 1u || VECS_PER_RUN == 1u;

// [quad of a vector][vector of a run][run]: neighbouring invocations read neighbouring entries.
var<workgroup> stage: array<vec4<f32>, STAGE_QUADS>;
// Sums of four matrix rows, one vector an invocation.
var<workgroup> partials: array<vec4<f32>, WORKGROUP_SIZE>;

fn row_sum(tile_row: u32) -> f32 {
    return partials[tile_row / 4u * LANES][tile_row % 4u];
}

fn input_quad(input: u32, col: u32) -> vec4<f32> {
    if INPUT_STRIDE % 4u == 0u && col < COLS {
        return input_four(input + col);
    }
    var values = vec4<f32>();
    if col < COLS {
        values.x = input_value(input + col);
    }
    if col + 1u < COLS {
        values.y = input_value(input + col + 1u);
    }
    if col + 2u < COLS {
        values.z = input_value(input + col + 2u);
    }
    if col + 3u < COLS {
        values.w = input_value(input + col + 3u);
    }
    return values;
}

// What scales a whole row's sum.
fn row_factor(span: Span, entering: u32, matrix_row: u32) -> f32 {
    return row_scale(span, matrix_row) * row_input_scale(entering);
}

fn row_vec(span: Span, matrix_row: u32, vec: u32) -> vec4<u32> {
    return segment[span.codes + (matrix_row - span.row_begin) * VECS_PER_ROW + vec];
}

// Four matrix rows: their codes, and the words where their scales begin.
struct Quartet {
    w0: vec4<u32>,
    w1: vec4<u32>,
    w2: vec4<u32>,
    w3: vec4<u32>,
    scales: vec4<u32>,
}

// Of four rows.
fn scales_at(scales: vec4<u32>, block: u32) -> vec4<f32> {
    return vec4<f32>(
        scale_at(scales.x, block),
        scale_at(scales.y, block),
        scale_at(scales.z, block),
        scale_at(scales.w, block),
    );
}

fn zeros_at(scales: vec4<u32>, block: u32) -> vec4<f32> {
    return vec4<f32>(
        zero_at(scales.x, block),
        zero_at(scales.y, block),
        zero_at(scales.z, block),
        zero_at(scales.w, block),
    );
}

fn mins_at(scales: vec4<u32>, block: u32) -> vec4<f32> {
    return vec4<f32>(
        min_at(scales.x, block),
        min_at(scales.y, block),
        min_at(scales.z, block),
        min_at(scales.w, block),
    );
}

// Scales of four columns of a row whose columns have blocks of their own.
fn ordered(span: Span, row: u32, scales: u32, col: u32, weights: vec4<f32>) -> vec4<f32> {
    let b0 = block_of(span, row, col);
    let b1 = block_of(span, row, col + 1u);
    let b2 = block_of(span, row, col + 2u);
    let b3 = block_of(span, row, col + 3u);
    let zeros = vec4<f32>(zero_at(scales, b0), zero_at(scales, b1), zero_at(scales, b2), zero_at(scales, b3));
    let factors = vec4<f32>(scale_at(scales, b0), scale_at(scales, b1), scale_at(scales, b2), scale_at(scales, b3));
    return (weights - zeros) * factors;
}

// A quad of four rows' codes times the staged columns. Called with a constant quad: a loop would index
// the codes at run time, which takes them out of registers.
fn quad_dots(four: Quartet, zeros: vec4<f32>, quad: u32, staged: u32) -> vec4<f32> {
    let x = stage[quad * STAGE_VECS + staged];
    if HAS_ZERO {
        return vec4<f32>(
            dot(weight_quad(four.w0, quad) - zeros.x, x),
            dot(weight_quad(four.w1, quad) - zeros.y, x),
            dot(weight_quad(four.w2, quad) - zeros.z, x),
            dot(weight_quad(four.w3, quad) - zeros.w, x),
        );
    }
    return vec4<f32>(
        dot(weight_quad(four.w0, quad), x),
        dot(weight_quad(four.w1, quad), x),
        dot(weight_quad(four.w2, quad), x),
        dot(weight_quad(four.w3, quad), x),
    );
}

fn ordered_dots(span: Span, rows: vec4<u32>, four: Quartet, quad: u32, staged: u32, col: u32) -> vec4<f32> {
    let x = stage[quad * STAGE_VECS + staged];
    let at = col + 4u * quad;
    return vec4<f32>(
        dot(ordered(span, rows.x, four.scales.x, at, weight_quad(four.w0, quad)), x),
        dot(ordered(span, rows.y, four.scales.y, at, weight_quad(four.w1, quad)), x),
        dot(ordered(span, rows.z, four.scales.z, at, weight_quad(four.w2, quad)), x),
        dot(ordered(span, rows.w, four.scales.w, at, weight_quad(four.w3, quad)), x),
    );
}

fn sum_of(staged: u32, quad: u32) -> f32 {
    return dot(stage[quad * STAGE_VECS + staged], vec4<f32>(1.0));
}

// Quads 0 to QUADS / SCALES_PER_VEC of four rows.
fn first_dots(four: Quartet, zeros: vec4<f32>, staged: u32) -> vec4<f32> {
    var partial = quad_dots(four, zeros, 0u, staged);
    if QUADS > 1u {
        partial += quad_dots(four, zeros, 1u, staged);
    }
    if QUADS > 2u {
        partial += quad_dots(four, zeros, 2u, staged);
        partial += quad_dots(four, zeros, 3u, staged);
    }
    if QUADS > 4u && SCALES_PER_VEC == 1u {
        partial += second_dots(four, zeros, staged);
    }
    return partial;
}

// The other half of 32 codes.
fn second_dots(four: Quartet, zeros: vec4<f32>, staged: u32) -> vec4<f32> {
    var partial = quad_dots(four, zeros, QUADS / 8u * 4u, staged);
    partial += quad_dots(four, zeros, QUADS / 8u * 5u, staged);
    partial += quad_dots(four, zeros, QUADS / 8u * 6u, staged);
    partial += quad_dots(four, zeros, QUADS / 8u * 7u, staged);
    return partial;
}

// All quads of a vector whose columns have blocks of their own.
fn all_ordered_dots(span: Span, rows: vec4<u32>, four: Quartet, staged: u32, col: u32) -> vec4<f32> {
    var partial = vec4<f32>();
    for (var quad = 0u; quad < QUADS; quad++) {
        partial += ordered_dots(span, rows, four, quad, staged, col);
    }
    return partial;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row = workgroup.y;
    if row >= token_count() * ROWS_PER_TOKEN {
        return;
    }
    let slot = slot_of(row);
    if slot < 0 {
        if FILL_ABSENT {
            let bits = select(0x7fc00000u, 0u, slot == -1);
            for (var col = workgroup.x * WORKGROUP_SIZE + index; col < OUT_COLS; col += workgroups.x * WORKGROUP_SIZE) {
                out[row * OUT_COLS + col] = bitcast<f32>(bits);
            }
        }
        return;
    }
    let span = span_of(u32(slot));
    let first = span.row_begin + workgroup.x * TILE_ROWS;
    if first >= span.row_end {
        return;
    }
    let entering = row / INPUT_DIVISOR;
    let input = entering * INPUT_STRIDE;
    let lane = index % LANES;
    // Rows past the end repeat the last one and are not stored.
    let last = span.row_end - 1u;
    let lane_first = first + index / LANES * 4u;
    let rows = min(vec4<u32>(lane_first) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(last));
    let scales = vec4<u32>(
        scale_row(span, rows.x),
        scale_row(span, rows.y),
        scale_row(span, rows.z),
        scale_row(span, rows.w),
    );
    var sums = vec4<f32>();
    for (var begin = 0u; begin < VECS_PER_ROW; begin += STAGE_VECS) {
        let count = min(STAGE_VECS, VECS_PER_ROW - begin);
        for (var quad = index; quad < count * QUADS; quad += WORKGROUP_SIZE) {
            let vec = quad / QUADS;
            let staged = quad % QUADS * STAGE_VECS + vec % VECS_PER_RUN * STAGE_RUNS + vec / VECS_PER_RUN;
            stage[staged] = weigh_input_quad(row, input_quad(input, begin * WEIGHTS_PER_VEC + quad * 4u));
        }
        workgroupBarrier();
        for (var run = lane; run * VECS_PER_RUN < count; run += LANES) {
            let run_col = (begin + run * VECS_PER_RUN) * WEIGHTS_PER_VEC;
            let block = block_of(span, first, run_col);
            var zeros = vec4<f32>();
            if HAS_ZERO {
                zeros = zeros_at(scales, block);
            }
            var partial = vec4<f32>();
            var second = vec4<f32>();
            var total = 0.0;
            for (var vec = 0u; vec < min(VECS_PER_RUN, count - run * VECS_PER_RUN); vec++) {
                let at = begin + run * VECS_PER_RUN + vec;
                let staged = vec * STAGE_RUNS + run;
                var four: Quartet;
                four.w0 = row_vec(span, rows.x, at);
                four.w1 = row_vec(span, rows.y, at);
                four.w2 = row_vec(span, rows.z, at);
                four.w3 = row_vec(span, rows.w, at);
                four.scales = scales;
                if ACT_ORDER {
                    sums += all_ordered_dots(span, rows, four, staged, at * WEIGHTS_PER_VEC);
                } else {
                    partial += first_dots(four, zeros, staged);
                    if SCALES_PER_VEC == 2u {
                        second += second_dots(four, zeros_at(scales, block_of(span, first, run_col + 16u)), staged);
                    }
                    if HAS_MIN {
                        for (var quad = 0u; quad < QUADS; quad++) {
                            total += sum_of(staged, quad);
                        }
                    }
                }
            }
            if !ACT_ORDER {
                sums += partial * scales_at(scales, block) * block_input_scale(entering, run_col);
                if SCALES_PER_VEC == 2u {
                    let other = block_of(span, first, run_col + 16u);
                    sums += second * scales_at(scales, other) * block_input_scale(entering, run_col + 16u);
                }
                if HAS_MIN {
                    sums -= mins_at(scales, block) * total;
                }
            }
        }
        workgroupBarrier();
    }
    partials[index] = sums;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            partials[index] += partials[index + half];
        }
    }
    workgroupBarrier();
    for (var feature = index; feature < TILE_ROWS / FEATURE_ROWS; feature += WORKGROUP_SIZE) {
        let tile_row = feature * FEATURE_ROWS;
        let matrix_row = first + tile_row;
        if matrix_row < span.row_end {
            let partner = matrix_row + FEATURE_ROWS - 1u;
            let gate_sum = row_sum(tile_row) * row_factor(span, entering, matrix_row);
            let up_sum = row_sum(tile_row + FEATURE_ROWS - 1u) * row_factor(span, entering, partner);
            let gate = add_delta(row, matrix_row, gate_sum) + row_bias(span, matrix_row);
            let up = add_delta(row, partner, up_sum) + row_bias(span, partner);
            let out_col = matrix_row / FEATURE_ROWS;
            out[row * OUT_COLS + out_col] = finish(row, out_col, gate, up);
        }
    }
}
