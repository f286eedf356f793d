// grouped_gemm, few rows: out[r, f] = finish(W[slot_of(r)] rows[r / INPUT_DIVISOR]).
// One workgroup: TILE_ROWS rows of one packed matrix for one row r. LANES invocations share four matrix rows and
// read neighbouring vectors of them, each of which is summed before its scales act.
// Packed matrix: see span.wgsl; with PAIR = 2 its rows alternate gate and up, FEATURE_ROWS of them yield a feature.
// out: f32 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs
const_assert TILE_ROWS * LANES == 4u * WORKGROUP_SIZE;
const_assert TILE_ROWS % PAIR == 0u;
// Zeros are subtracted from codes that lack no factor.
const_assert WEIGHT_FACTOR == 1.0 || !HAS_ZERO;
const FACTOR: f32 = WEIGHT_FACTOR * INPUT_FACTOR;

// A quad of four rows' codes times the columns that meet them. Called with a constant quad: a loop would index
// the codes at run time, which takes them out of registers.
fn quad_dots(four: Quartet, zeros: vec4<f32>, quad: u32, entering: Entering) -> vec4<f32> {
    let x = entering_quad(entering, quad);
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

fn ordered_dots(span: Span, rows: vec4<u32>, four: Quartet, quad: u32, entering: Entering, col: u32) -> vec4<f32> {
    let x = entering_quad(entering, quad);
    let at = col + 4u * quad;
    return vec4<f32>(
        dot(ordered(span, rows.x, four.scales.x, at, weight_quad(four.w0, quad)), x),
        dot(ordered(span, rows.y, four.scales.y, at, weight_quad(four.w1, quad)), x),
        dot(ordered(span, rows.z, four.scales.z, at, weight_quad(four.w2, quad)), x),
        dot(ordered(span, rows.w, four.scales.w, at, weight_quad(four.w3, quad)), x),
    );
}

// Quads 0 to QUADS / SCALES_PER_VEC of four rows.
fn first_dots(four: Quartet, zeros: vec4<f32>, entering: Entering) -> vec4<f32> {
    var partial = quad_dots(four, zeros, 0u, entering);
    if QUADS > 1u {
        partial += quad_dots(four, zeros, 1u, entering);
    }
    if QUADS > 2u {
        partial += quad_dots(four, zeros, 2u, entering);
        partial += quad_dots(four, zeros, 3u, entering);
    }
    if QUADS > 4u && SCALES_PER_VEC == 1u {
        partial += second_dots(four, zeros, entering);
    }
    return partial;
}

// The other half of 32 codes.
fn second_dots(four: Quartet, zeros: vec4<f32>, entering: Entering) -> vec4<f32> {
    var partial = quad_dots(four, zeros, QUADS / 8u * 4u, entering);
    partial += quad_dots(four, zeros, QUADS / 8u * 5u, entering);
    partial += quad_dots(four, zeros, QUADS / 8u * 6u, entering);
    partial += quad_dots(four, zeros, QUADS / 8u * 7u, entering);
    return partial;
}

// All quads of a vector whose columns have blocks of their own.
fn all_ordered_dots(span: Span, rows: vec4<u32>, four: Quartet, entering: Entering, col: u32) -> vec4<f32> {
    var partial = vec4<f32>();
    for (var quad = 0u; quad < QUADS; quad++) {
        partial += ordered_dots(span, rows, four, quad, entering, col);
    }
    return partial;
}

// The sum of the columns that meet a vector.
fn entering_sum(entering: Entering) -> f32 {
    var total = vec4<f32>();
    for (var quad = 0u; quad < QUADS; quad++) {
        total += entering_quad(entering, quad);
    }
    return INPUT_FACTOR * dot(total, vec4<f32>(1.0));
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
    let token_row = row / INPUT_DIVISOR;
    let lane = index % LANES;
    let rows = quartet_rows(span, first, index);
    let codes = quartet_codes(span, rows);
    let scales = quartet_scales(span, rows);
    var sums = vec4<f32>();
    var nans = vec4<u32>();
    for (var begin = 0u; begin < VECS_PER_ROW; begin += STAGE_VECS) {
        let count = min(STAGE_VECS, VECS_PER_ROW - begin);
        if STAGED {
            stage_input(row, index, begin, count);
            workgroupBarrier();
        }
        for (var vec = lane; vec < count; vec += LANES) {
            let at = begin + vec;
            let four = quartet_at(codes, scales, at);
            let entering = entering_at(row, begin, vec);
            nans |= vec4<u32>(entering_nans(entering)) | quartet_nans(four);
            let col = at * WEIGHTS_PER_VEC;
            if ACT_ORDER {
                sums += FACTOR * all_ordered_dots(span, rows, four, entering, col);
            } else {
                let block = block_of(span, first, col);
                var zeros = vec4<f32>();
                if HAS_ZERO {
                    zeros = zeros_at(scales, block);
                }
                let partial = first_dots(four, zeros, entering);
                sums += partial * (scales_at(scales, block) * (FACTOR * block_input_scale(token_row, col)));
                if SCALES_PER_VEC == 2u {
                    let other = block_of(span, first, col + 16u);
                    let second = second_dots(four, zeros_at(scales, other), entering);
                    sums += second * (scales_at(scales, other) * (FACTOR * block_input_scale(token_row, col + 16u)));
                }
                if HAS_MIN {
                    sums -= mins_at(scales, block) * entering_sum(entering);
                }
            }
        }
        if STAGED {
            workgroupBarrier();
        }
    }
    let nan = vec4<f32>(bitcast<f32>(0x7fc00000u | (nans.x & 1u)));
    store(span, first, row, true, select(sums, nan, nans != vec4<u32>()), index);
}
