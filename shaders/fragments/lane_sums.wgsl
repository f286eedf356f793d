// Sums of four matrix rows, one vector an invocation.
var<workgroup> partials: array<vec4<f32>, WORKGROUP_SIZE>;

fn row_sum(tile_row: u32) -> f32 {
    return partials[tile_row / 4u * LANES][tile_row % 4u];
}

// What scales a whole row's sum.
fn row_factor(span: Span, entering: u32, matrix_row: u32) -> f32 {
    return row_scale(span, matrix_row) * row_input_scale(entering);
}

// Adds the lanes' sums of a row of the tile, and stores what becomes of them.
fn store(span: Span, first: u32, row: u32, wanted: bool, sums: vec4<f32>, index: u32) {
    let lane = index % LANES;
    partials[index] = sums;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            partials[index] += partials[index + half];
        }
    }
    workgroupBarrier();
    let token_row = row / INPUT_DIVISOR;
    for (var feature = index; wanted && feature < TILE_ROWS / FEATURE_ROWS; feature += WORKGROUP_SIZE) {
        let tile_row = feature * FEATURE_ROWS;
        let matrix_row = first + tile_row;
        if matrix_row < span.row_end {
            let partner = matrix_row + FEATURE_ROWS - 1u;
            let gate_sum = row_sum(tile_row) * row_factor(span, token_row, matrix_row);
            let up_sum = row_sum(tile_row + FEATURE_ROWS - 1u) * row_factor(span, token_row, partner);
            let gate = add_delta(row, matrix_row, gate_sum) + row_bias(span, matrix_row);
            let up = add_delta(row, partner, up_sum) + row_bias(span, partner);
            let out_col = matrix_row / FEATURE_ROWS;
            out[row * OUT_COLS + out_col] = finish(row, out_col, gate, up);
        }
    }
}
