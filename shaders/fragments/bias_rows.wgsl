fn row_bias(span: Span, row: u32) -> f32 {
    return bitcast<f32>(segment_word(span.bias + row - span.row_begin));
}
