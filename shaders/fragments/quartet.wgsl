// Four matrix rows: their codes, and the words where their scales begin.
struct Quartet {
    w0: vec4<u32>,
    w1: vec4<u32>,
    w2: vec4<u32>,
    w3: vec4<u32>,
    scales: vec4<u32>,
}

// The four matrix rows of an invocation: those past the end repeat the last one and are not stored.
fn quartet_rows(span: Span, first: u32, index: u32) -> vec4<u32> {
    let rows = vec4<u32>(first + index / LANES * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    return min(rows, vec4<u32>(span.row_end - 1u));
}

// Where their codes begin, in vectors.
fn quartet_codes(span: Span, rows: vec4<u32>) -> vec4<u32> {
    return vec4<u32>(span.codes) + (rows - vec4<u32>(span.row_begin)) * VECS_PER_ROW;
}

// Where their scales begin, in words.
fn quartet_scales(span: Span, rows: vec4<u32>) -> vec4<u32> {
    return vec4<u32>(
        scale_row(span, rows.x),
        scale_row(span, rows.y),
        scale_row(span, rows.z),
        scale_row(span, rows.w),
    );
}

// Vector `at` of each.
fn quartet_at(codes: vec4<u32>, scales: vec4<u32>, at: u32) -> Quartet {
    return Quartet(
        segment[codes.x + at],
        segment[codes.y + at],
        segment[codes.z + at],
        segment[codes.w + at],
        scales,
    );
}

// Not zero where a row has a NaN that its decoded codes do not show.
fn quartet_nans(four: Quartet) -> vec4<u32> {
    return vec4<u32>(
        weight_nans(four.w0),
        weight_nans(four.w1),
        weight_nans(four.w2),
        weight_nans(four.w3),
    );
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
