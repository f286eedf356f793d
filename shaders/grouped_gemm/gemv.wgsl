// grouped_gemm, few rows: out[r, f] = activate(W[slot_of(r)] rows[r / INPUT_DIVISOR]).
// One workgroup: TILE_ROWS rows of one packed matrix for one row r. LANES invocations share a matrix row.
// Packed matrix: see span.wgsl; with PAIR = 2 its rows alternate gate and up and yield one feature.
// out: f32 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs
const QUADS: u32 = WEIGHTS_PER_VEC / 4u;
const STAGE_VECS: u32 = STAGE_QUADS / QUADS;
const ROWS_PER_LANE: u32 = TILE_ROWS * LANES / WORKGROUP_SIZE;
const_assert TILE_ROWS * LANES % WORKGROUP_SIZE == 0u;
const_assert TILE_ROWS % PAIR == 0u;

var<workgroup> stage: array<vec4<f32>, STAGE_QUADS>;
var<workgroup> partials: array<f32, WORKGROUP_SIZE * ROWS_PER_LANE>;

fn row_sum(tile_row: u32) -> f32 {
    return partials[tile_row % ROWS_PER_LANE * WORKGROUP_SIZE + tile_row / ROWS_PER_LANE * LANES];
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
    let lane_first = first + index / LANES * ROWS_PER_LANE;
    var sums: array<f32, ROWS_PER_LANE>;
    for (var begin = 0u; begin < VECS_PER_ROW; begin += STAGE_VECS) {
        let count = min(STAGE_VECS, VECS_PER_ROW - begin);
        for (var quad = index; quad < count * QUADS; quad += WORKGROUP_SIZE) {
            let col = begin * WEIGHTS_PER_VEC + quad * 4u;
            var values = vec4<f32>();
            for (var i = 0u; i < 4u; i++) {
                if col + i < COLS {
                    values[i] = input_value(input + col + i);
                }
            }
            stage[quad] = values;
        }
        workgroupBarrier();
        for (var vec = lane; vec < count; vec += LANES) {
            for (var r = 0u; r < ROWS_PER_LANE; r++) {
                // Rows past the end repeat the last one and are not stored.
                let matrix_row = min(lane_first + r, span.row_end - 1u);
                let words = segment[span.codes + (matrix_row - span.row_begin) * VECS_PER_ROW + begin + vec];
                var partial = 0.0;
                for (var quad = 0u; quad < QUADS; quad++) {
                    partial += dot(weight_quad(words, quad), stage[vec * QUADS + quad]);
                }
                sums[r] += partial * weight_scale(span, matrix_row, (begin + vec) * WEIGHTS_PER_VEC);
            }
        }
        workgroupBarrier();
    }
    for (var r = 0u; r < ROWS_PER_LANE; r++) {
        partials[r * WORKGROUP_SIZE + index] = sums[r];
    }
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            for (var r = 0u; r < ROWS_PER_LANE; r++) {
                let at = r * WORKGROUP_SIZE + index;
                partials[at] += partials[at + half];
            }
        }
    }
    workgroupBarrier();
    for (var feature = index; feature < TILE_ROWS / PAIR; feature += WORKGROUP_SIZE) {
        let matrix_row = first + feature * PAIR;
        if matrix_row < span.row_end {
            let gate = row_sum(feature * PAIR) + row_bias(span, matrix_row);
            let last = matrix_row + PAIR - 1u;
            let up = row_sum(feature * PAIR + PAIR - 1u) + row_bias(span, last);
            out[row * OUT_COLS + matrix_row / PAIR] = activate(gate, up);
        }
    }
}
