// What scales a whole row's sum.
fn row_factor(span: Span, entering: u32, matrix_row: u32) -> f32 {
    return row_scale(span, matrix_row) * row_input_scale(entering);
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
