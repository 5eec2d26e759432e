// The names of the intrinsics, which stand for the functions of emulated_avx512.h from here on.
#pragma once

#undef _mm512_abs_ps
#define _mm512_abs_ps emulated::abs_ps
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::add_epi32
#undef _mm512_add_ps
#define _mm512_add_ps emulated::add_ps
#undef _mm512_and_ps
#define _mm512_and_ps emulated::and_ps
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::and_si512
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated::castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::castsi512_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#undef _mm512_cmpeq_epi16_mask
#define _mm512_cmpeq_epi16_mask emulated::cmpeq_epi16_mask
#undef _mm512_cmpge_epu8_mask
#define _mm512_cmpge_epu8_mask emulated::cmpge_epu8_mask
#undef _mm512_cmple_epi32_mask
#define _mm512_cmple_epi32_mask emulated::cmple_epi32_mask
#undef _mm512_cmplt_epi32_mask
#define _mm512_cmplt_epi32_mask emulated::cmplt_epi32_mask
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::cvtps_ph
#undef _mm512_div_ps
#define _mm512_div_ps emulated::div_ps
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_getexp_ps
#define _mm512_getexp_ps emulated::getexp_ps
#undef _mm512_load_si512
#define _mm512_load_si512 emulated::load_si512
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::loadu_si512
#undef _mm512_mask_cmp_ps_mask
#define _mm512_mask_cmp_ps_mask emulated::mask_cmp_ps_mask
#undef _mm512_mask_expand_epi32
#define _mm512_mask_expand_epi32 emulated::mask_expand_epi32
#undef _mm512_mask_expand_ps
#define _mm512_mask_expand_ps emulated::mask_expand_ps
#undef _mm512_mask_mov_epi32
#define _mm512_mask_mov_epi32 emulated::mask_mov_epi32
#undef _mm512_mask_mov_ps
#define _mm512_mask_mov_ps emulated::mask_mov_ps
#undef _mm512_mask_shuffle_epi32
#define _mm512_mask_shuffle_epi32 emulated::mask_shuffle_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#undef _mm512_mask_ternarylogic_epi32
#define _mm512_mask_ternarylogic_epi32 emulated::mask_ternarylogic_epi32
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#undef _mm512_maskz_compress_epi32
#define _mm512_maskz_compress_epi32 emulated::maskz_compress_epi32
#undef _mm512_maskz_compress_ps
#define _mm512_maskz_compress_ps emulated::maskz_compress_ps
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#undef _mm512_maskz_mul_ps
#define _mm512_maskz_mul_ps emulated::maskz_mul_ps
#undef _mm512_maskz_roundscale_ps
#define _mm512_maskz_roundscale_ps emulated::maskz_roundscale_ps
#undef _mm512_maskz_scalef_ps
#define _mm512_maskz_scalef_ps emulated::maskz_scalef_ps
#undef _mm512_maskz_srli_epi32
#define _mm512_maskz_srli_epi32 emulated::maskz_srli_epi32
#undef _mm512_maskz_sub_ps
#define _mm512_maskz_sub_ps emulated::maskz_sub_ps
#undef _mm512_max_ps
#define _mm512_max_ps emulated::max_ps
#undef _mm512_min_epu16
#define _mm512_min_epu16 emulated::min_epu16
#undef _mm512_min_ps
#define _mm512_min_ps emulated::min_ps
#undef _mm512_mul_epu32
#define _mm512_mul_epu32 emulated::mul_epu32
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated::mul_ps
#undef _mm512_or_ps
#define _mm512_or_ps emulated::or_ps
#undef _mm512_or_si512
#define _mm512_or_si512 emulated::or_si512
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32 emulated::permutexvar_epi32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_reduce_ps
#define _mm512_reduce_ps emulated::reduce_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated::scalef_ps
#undef _mm512_mask_sub_ps
#define _mm512_mask_sub_ps emulated::mask_sub_ps
#undef _mm512_mask_max_ps
#define _mm512_mask_max_ps emulated::mask_max_ps
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 emulated::set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated::setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated::setzero_si512
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32 emulated::shuffle_epi32
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 emulated::shuffle_epi8
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps emulated::shuffle_ps
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#undef _mm512_sub_epi16
#define _mm512_sub_epi16 emulated::sub_epi16
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated::sub_ps
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 emulated::ternarylogic_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated::unpackhi_epi64
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps emulated::unpackhi_ps
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated::unpacklo_epi64
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps emulated::unpacklo_ps
#undef _mm512_xor_ps
#define _mm512_xor_ps emulated::xor_ps
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated::xor_si512
