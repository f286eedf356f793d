// Word where the scales of a row's blocks begin; gate and up rows, which alternate, have scales of their own.
fn scale_row(span: Span, row: u32) -> u32 {
    let block_row = (row / (PAIR * BLOCK_ROWS) - span.first_block) * PAIR + row % PAIR;
    return span.scales + block_row * SCALE_WORDS;
}
