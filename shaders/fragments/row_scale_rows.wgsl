fn row_scale(span: Span, row: u32) -> f32 {
    return bitcast<f32>(segment_word(span.row_scales + row - span.row_begin));
}
