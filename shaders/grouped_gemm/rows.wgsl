// grouped_gemm, some rows: out[r, f] = finish(W[slot of r] rows[r / INPUT_DIVISOR]).
// One workgroup: ROWS rows of one group x TILE_ROWS rows of its packed matrix. LANES invocations share four matrix
// rows, read neighbouring vectors of them, and decode each once for all rows.
// Rows come by index from tile_row, results go back to the same index: nothing is gathered or padded.
// Packed matrix: see span.wgsl; with PAIR = 2 its rows alternate gate and up, FEATURE_ROWS of them yield a feature.
// out: f32 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs
const_assert TILE_ROWS * LANES == 4u * WORKGROUP_SIZE;
const_assert TILE_ROWS % PAIR == 0u;
const_assert ROWS == 2u || ROWS == 4u || ROWS == 8u;
// Zeros are subtracted from codes that lack no factor.
const_assert WEIGHT_FACTOR == 1.0 || !HAS_ZERO;

// Four matrix rows times each of the tile's rows.
struct Sums {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
    e: vec4<f32>,
    f: vec4<f32>,
    g: vec4<f32>,
    h: vec4<f32>,
}

// The rows of a tile, or what they enter by.
struct Eight {
    low: vec4<u32>,
    high: vec4<u32>,
}

fn four_dots(w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(dot(w0, x), dot(w1, x), dot(w2, x), dot(w3, x));
}

// A quad of codes for all rows. Called with a constant quad: a loop would index the codes at run time, which takes
// them out of registers.
fn add_quad(sums: ptr<function, Sums>, four: Quartet, zeros: vec4<f32>, quad: u32, staged: u32) {
    var w0 = weight_quad(four.w0, quad);
    var w1 = weight_quad(four.w1, quad);
    var w2 = weight_quad(four.w2, quad);
    var w3 = weight_quad(four.w3, quad);
    if HAS_ZERO {
        w0 -= zeros.x;
        w1 -= zeros.y;
        w2 -= zeros.z;
        w3 -= zeros.w;
    }
    add_dots(sums, w0, w1, w2, w3, quad * STAGE_VECS + staged);
}

fn add_dots(
    sums: ptr<function, Sums>,
    w0: vec4<f32>,
    w1: vec4<f32>,
    w2: vec4<f32>,
    w3: vec4<f32>,
    at: u32,
) {
    (*sums).a += four_dots(w0, w1, w2, w3, stage[at]);
    (*sums).b += four_dots(w0, w1, w2, w3, stage[STAGE_QUADS + at]);
    if ROWS > 2u {
        (*sums).c += four_dots(w0, w1, w2, w3, stage[2u * STAGE_QUADS + at]);
        (*sums).d += four_dots(w0, w1, w2, w3, stage[3u * STAGE_QUADS + at]);
    }
    if ROWS > 4u {
        (*sums).e += four_dots(w0, w1, w2, w3, stage[4u * STAGE_QUADS + at]);
        (*sums).f += four_dots(w0, w1, w2, w3, stage[5u * STAGE_QUADS + at]);
        (*sums).g += four_dots(w0, w1, w2, w3, stage[6u * STAGE_QUADS + at]);
        (*sums).h += four_dots(w0, w1, w2, w3, stage[7u * STAGE_QUADS + at]);
    }
}

// Quads 0 to QUADS / SCALES_PER_VEC.
fn first_dots(four: Quartet, zeros: vec4<f32>, staged: u32) -> Sums {
    var sums: Sums;
    add_quad(&sums, four, zeros, 0u, staged);
    if QUADS > 1u {
        add_quad(&sums, four, zeros, 1u, staged);
    }
    if QUADS > 2u {
        add_quad(&sums, four, zeros, 2u, staged);
        add_quad(&sums, four, zeros, 3u, staged);
    }
    if QUADS > 4u && SCALES_PER_VEC == 1u {
        add_second(&sums, four, zeros, staged);
    }
    return sums;
}

// The other half of 32 codes.
fn add_second(sums: ptr<function, Sums>, four: Quartet, zeros: vec4<f32>, staged: u32) {
    add_quad(sums, four, zeros, QUADS / 8u * 4u, staged);
    add_quad(sums, four, zeros, QUADS / 8u * 5u, staged);
    add_quad(sums, four, zeros, QUADS / 8u * 6u, staged);
    add_quad(sums, four, zeros, QUADS / 8u * 7u, staged);
}

fn second_dots(four: Quartet, zeros: vec4<f32>, staged: u32) -> Sums {
    var sums: Sums;
    add_second(&sums, four, zeros, staged);
    return sums;
}

// All quads of a vector whose columns have blocks of their own, scaled.
fn ordered_dots(span: Span, rows: vec4<u32>, four: Quartet, staged: u32, col: u32) -> Sums {
    var sums: Sums;
    for (var quad = 0u; quad < QUADS; quad++) {
        let at = col + 4u * quad;
        add_dots(
            &sums,
            ordered(span, rows.x, four.scales.x, at, weight_quad(four.w0, quad)),
            ordered(span, rows.y, four.scales.y, at, weight_quad(four.w1, quad)),
            ordered(span, rows.z, four.scales.z, at, weight_quad(four.w2, quad)),
            ordered(span, rows.w, four.scales.w, at, weight_quad(four.w3, quad)),
            quad * STAGE_VECS + staged,
        );
    }
    return sums;
}

// The sum of the columns of a row that meet a vector.
fn entering_sum(row: u32, staged: u32) -> f32 {
    var total = vec4<f32>();
    for (var quad = 0u; quad < QUADS; quad++) {
        total += stage[row * STAGE_QUADS + quad * STAGE_VECS + staged];
    }
    return dot(total, vec4<f32>(1.0));
}

// The row of the tile that stands for row `r` of it: rows past the end repeat the last and are not stored.
fn entering_row(tile: Tile, r: u32) -> u32 {
    return tile_row(tile, tile.first + min(r, tile.count - 1u));
}

fn add_scaled(
    sums: ptr<function, Sums>,
    partial: Sums,
    scales: vec4<f32>,
    entering: Eight,
    col: u32,
) {
    (*sums).a += partial.a * (scales * block_input_scale(entering.low.x, col));
    (*sums).b += partial.b * (scales * block_input_scale(entering.low.y, col));
    if ROWS > 2u {
        (*sums).c += partial.c * (scales * block_input_scale(entering.low.z, col));
        (*sums).d += partial.d * (scales * block_input_scale(entering.low.w, col));
    }
    if ROWS > 4u {
        (*sums).e += partial.e * (scales * block_input_scale(entering.high.x, col));
        (*sums).f += partial.f * (scales * block_input_scale(entering.high.y, col));
        (*sums).g += partial.g * (scales * block_input_scale(entering.high.z, col));
        (*sums).h += partial.h * (scales * block_input_scale(entering.high.w, col));
    }
}

// Stores, and `partials` is free again.
fn store_next(span: Span, first: u32, row: u32, wanted: bool, sums: vec4<f32>, index: u32) {
    store(span, first, row, wanted, sums, index);
    workgroupBarrier();
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let tile = tile_of(workgroup.y);
    if tile.slot < 0 {
        return;
    }
    let span = span_of(u32(tile.slot));
    let first = span.row_begin + workgroup.x * TILE_ROWS;
    if first >= span.row_end {
        return;
    }
    let tile_rows = Eight(
        vec4<u32>(
            entering_row(tile, 0u),
            entering_row(tile, 1u),
            entering_row(tile, 2u),
            entering_row(tile, 3u),
        ),
        vec4<u32>(
            entering_row(tile, 4u),
            entering_row(tile, 5u),
            entering_row(tile, 6u),
            entering_row(tile, 7u),
        ),
    );
    let entering = Eight(tile_rows.low / vec4<u32>(INPUT_DIVISOR), tile_rows.high / vec4<u32>(INPUT_DIVISOR));
    let lane = index % LANES;
    let rows = quartet_rows(span, first, index);
    let codes = quartet_codes(span, rows);
    let scales = quartet_scales(span, rows);
    var sums: Sums;
    var nans = vec4<u32>();
    for (var begin = 0u; begin < VECS_PER_ROW; begin += STAGE_VECS) {
        let count = min(STAGE_VECS, VECS_PER_ROW - begin);
        for (var r = 0u; r < ROWS; r++) {
            let row = entering_row(tile, r);
            let input = row / INPUT_DIVISOR * INPUT_STRIDE;
            for (var quad = index; quad < count * QUADS; quad += WORKGROUP_SIZE) {
                let values = input_quad(input, begin * WEIGHTS_PER_VEC + quad * 4u);
                stage[r * STAGE_QUADS + quad % QUADS * STAGE_VECS + quad / QUADS] = weigh_input_quad(row, values);
            }
        }
        workgroupBarrier();
        for (var vec = lane; vec < count; vec += LANES) {
            let at = begin + vec;
            let four = quartet_at(codes, scales, at);
            nans |= quartet_nans(four);
            let col = at * WEIGHTS_PER_VEC;
            if ACT_ORDER {
                add_scaled(&sums, ordered_dots(span, rows, four, vec, col), vec4<f32>(WEIGHT_FACTOR), entering, col);
            } else {
                let block = block_of(span, first, col);
                var zeros = vec4<f32>();
                if HAS_ZERO {
                    zeros = zeros_at(scales, block);
                }
                let partial = first_dots(four, zeros, vec);
                add_scaled(&sums, partial, WEIGHT_FACTOR * scales_at(scales, block), entering, col);
                if SCALES_PER_VEC == 2u {
                    let other = block_of(span, first, col + 16u);
                    let second = second_dots(four, zeros_at(scales, other), vec);
                    add_scaled(&sums, second, WEIGHT_FACTOR * scales_at(scales, other), entering, col + 16u);
                }
                if HAS_MIN {
                    let mins = mins_at(scales, block);
                    sums.a -= mins * entering_sum(0u, vec);
                    sums.b -= mins * entering_sum(1u, vec);
                    if ROWS > 2u {
                        sums.c -= mins * entering_sum(2u, vec);
                        sums.d -= mins * entering_sum(3u, vec);
                    }
                    if ROWS > 4u {
                        sums.e -= mins * entering_sum(4u, vec);
                        sums.f -= mins * entering_sum(5u, vec);
                        sums.g -= mins * entering_sum(6u, vec);
                        sums.h -= mins * entering_sum(7u, vec);
                    }
                }
            }
        }
        workgroupBarrier();
    }
    let nan = vec4<f32>(bitcast<f32>(0x7fc00000u | (nans.x & 1u)));
    let spoiled = nans != vec4<u32>();
    store_next(span, first, tile_rows.low.x, true, select(sums.a, nan, spoiled), index);
    store_next(span, first, tile_rows.low.y, tile.count > 1u, select(sums.b, nan, spoiled), index);
    if ROWS > 2u {
        store_next(span, first, tile_rows.low.z, tile.count > 2u, select(sums.c, nan, spoiled), index);
        store_next(span, first, tile_rows.low.w, tile.count > 3u, select(sums.d, nan, spoiled), index);
    }
    if ROWS > 4u {
        store_next(span, first, tile_rows.high.x, tile.count > 4u, select(sums.e, nan, spoiled), index);
        store_next(span, first, tile_rows.high.y, tile.count > 5u, select(sums.f, nan, spoiled), index);
        store_next(span, first, tile_rows.high.z, tile.count > 6u, select(sums.g, nan, spoiled), index);
        store_next(span, first, tile_rows.high.w, tile.count > 7u, select(sums.h, nan, spoiled), index);
    }
}
