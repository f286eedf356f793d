// Scale of element (row, col); gate and up rows, which alternate, have scales of their own.
fn weight_scale(span: Span, row: u32, col: u32) -> f32 {
    let block_row = (row / (PAIR * BLOCK_ROWS) - span.first_block) * PAIR + row % PAIR;
    return bitcast<f32>(segment_word(span.scales + block_row * BLOCKS_PER_ROW + col / BLOCK_COLS));
}
