// grouped_gemm, few rows: out[r, f] = finish(W[slot_of(r)] rows[r / INPUT_DIVISOR]).
// One workgroup: TILE_ROWS rows of one packed matrix for one row r. LANES invocations share four matrix rows.
// Packed matrix: see span.wgsl; with PAIR = 2 its rows alternate gate and up and yield one feature.
// out: f32 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs
const QUADS: u32 = WEIGHTS_PER_VEC / 4u;
const STAGE_VECS: u32 = STAGE_QUADS / QUADS;
const_assert TILE_ROWS * LANES == 4u * WORKGROUP_SIZE;
const_assert TILE_ROWS % PAIR == 0u;

// [quad of a vector][vector]: neighbouring invocations read neighbouring entries.
var<workgroup> stage: array<vec4<f32>, STAGE_QUADS>;
// Sums of four matrix rows, one vector an invocation.
var<workgroup> partials: array<vec4<f32>, WORKGROUP_SIZE>;

fn row_sum(tile_row: u32) -> f32 {
    return partials[tile_row / 4u * LANES][tile_row % 4u];
}

fn input_quad(input: u32, col: u32) -> vec4<f32> {
    if COLS % 4u == 0u && col < COLS {
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

fn row_vec(span: Span, matrix_row: u32, vec: u32) -> vec4<u32> {
    return segment[span.codes + (matrix_row - span.row_begin) * VECS_PER_ROW + vec];
}

// A quad of four rows' codes times the staged columns. Called with a constant quad: a loop would index
// the codes at run time, which takes them out of registers.
fn quad_dots(w0: vec4<u32>, w1: vec4<u32>, w2: vec4<u32>, w3: vec4<u32>, quad: u32, staged: u32) -> vec4<f32> {
    let x = stage[quad * STAGE_VECS + staged];
    return vec4<f32>(
        dot(weight_quad(w0, quad), x),
        dot(weight_quad(w1, quad), x),
        dot(weight_quad(w2, quad), x),
        dot(weight_quad(w3, quad), x),
    );
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let row = workgroup.y;
    if row >= token_count() * ROWS_PER_TOKEN {
        return;
    }
    let slot = slot_of(row);
    if slot < 0 {
        return;
    }
    let span = span_of(u32(slot));
    let first = span.row_begin + workgroup.x * TILE_ROWS;
    if first >= span.row_end {
        return;
    }
    let input = row / INPUT_DIVISOR * COLS;
    let lane = index % LANES;
    // Rows past the end repeat the last one and are not stored.
    let last = span.row_end - 1u;
    let lane_first = first + index / LANES * 4u;
    let r0 = min(lane_first, last);
    let r1 = min(lane_first + 1u, last);
    let r2 = min(lane_first + 2u, last);
    let r3 = min(lane_first + 3u, last);
    var sums = vec4<f32>();
    for (var begin = 0u; begin < VECS_PER_ROW; begin += STAGE_VECS) {
        let count = min(STAGE_VECS, VECS_PER_ROW - begin);
        for (var quad = index; quad < count * QUADS; quad += WORKGROUP_SIZE) {
            let staged = quad % QUADS * STAGE_VECS + quad / QUADS;
            stage[staged] = weigh_input_quad(row, input_quad(input, begin * WEIGHTS_PER_VEC + quad * 4u));
        }
        workgroupBarrier();
        for (var vec = lane; vec < count; vec += LANES) {
            let at = begin + vec;
            let w0 = row_vec(span, r0, at);
            let w1 = row_vec(span, r1, at);
            let w2 = row_vec(span, r2, at);
            let w3 = row_vec(span, r3, at);
            var partial = quad_dots(w0, w1, w2, w3, 0u, vec);
            if QUADS > 1u {
                partial += quad_dots(w0, w1, w2, w3, 1u, vec);
            }
            if QUADS > 2u {
                partial += quad_dots(w0, w1, w2, w3, 2u, vec);
                partial += quad_dots(w0, w1, w2, w3, 3u, vec);
            }
            let col = at * WEIGHTS_PER_VEC;
            sums += partial * vec4<f32>(
                weight_scale(span, r0, col),
                weight_scale(span, r1, col),
                weight_scale(span, r2, col),
                weight_scale(span, r3, col),
            );
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
    for (var feature = index; feature < TILE_ROWS / PAIR; feature += WORKGROUP_SIZE) {
        let matrix_row = first + feature * PAIR;
        if matrix_row < span.row_end {
            let gate = row_sum(feature * PAIR) + row_bias(span, matrix_row);
            let partner = matrix_row + PAIR - 1u;
            let up = row_sum(feature * PAIR + PAIR - 1u) + row_bias(span, partner);
            let out_col = matrix_row / PAIR;
            out[row * OUT_COLS + out_col] = finish(row, out_col, gate, up);
        }
    }
}
