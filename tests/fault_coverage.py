"""Which test shows what: the rows of the fault list, and the traps between float formats.

A test is named "folder:test_name"; ``FOLDERS`` says which folder is meant, and any file in it may
hold the test. ``ABSENT`` names what is not built, so that there is nothing to test.
"""

from __future__ import annotations

__all__ = ["ABSENT", "FAULTS", "FOLDERS", "TRAPS"]

FOLDERS = {
    "core": "core/tests",
    "tests": "tests",
    "cpu": "plugins/kernels_cpu/tests",
    "npu": "plugins/kernels_npu/tests",
    "ct": "plugins/compressed_tensors/tests",
    "modelslim": "plugins/modelslim_npu/tests",
    "bnb": "plugins/bitsandbytes/tests",
    **{
        name: f"plugins/{name}/tests"
        for name in "autoround awq fp8 gguf gptq hqq mxfp4 mxfp8 nvfp4 quark torchao".split()
    },
}

_FOLDER = "tests:test_faulty_folder_fails_by_name_and_a_good_load_follows"
_JSON = "tests:test_faulty_config_json_fails_by_name_and_a_good_load_follows"

FAULTS: dict[str, str] = {
    # A: containers
    "A01 A02 A03 A04 A05 A06 A08 A09 A10 A11 A12 A13 A14 A15 A16 A17 A18 A19 A20 A22 A23": _FOLDER,
    "A06 ": "tests:test_hostile_header_costs_little_memory",
    "A07": "tests:test_a07_more_tensors_than_the_cap_stops_at_the_cap",
    "A14 ": "tests:test_a14_pickle_is_never_run",
    "A20 ": "tests:test_a20_hub_cache_links_into_own_blobs_are_allowed",
    "A21": "tests:test_a21_wrong_total_size_is_a_warning",
    "A22 ": "tests:test_a22_all_shards_without_index_are_read_and_said",
    "A23 ": "tests:test_a23_no_permission_gives_the_reason_in_words",
    "A24": "tests:test_a24_file_cut_after_open_is_noticed",
    "A25": "tests:test_a25_overwritten_file_leaves_loaded_tensors_alone",
    "A26": "tests:test_a26_read_error_mid_file tests:test_a26_disk_full_leaves_nothing",
    "A27": "tests:test_a27_two_thousand_shards_with_64_file_handles "
    "tests:test_a27_hundred_thousand_tensors_of_400_gb_open_in_200_mb",
    "A28": "tests:test_a28_empty_scalar_and_unaligned_tensors_are_accepted",
    "A29": "tests:test_a29_strange_names_load tests:test_a29_strange_names_are_escaped_in_messages "
    "core:test_escape_sequences_in_names_never_reach_the_terminal",
    "A30": "tests:test_a30_second_writer_of_a_folder_fails_and_the_first_is_whole",
    # B: configuration
    "B01": "tests:test_unknown_quant_method_never_loads_as_float "
    "core:test_unknown_quant_method_lists_installed_plugins",
    "B02": "tests:test_b02_string_of_10_mb_does_not_reach_the_message "
    "core:test_malformed_quantization_config_is_a_type_error",
    "B03 B07 B08 B18": _JSON,
    "B04": "gptq:test_bad_bits_raise awq:test_other_bits_raise_cfg_value_with_the_allowed_set "
    "autoround:test_wrong_bits_raise_and_name_the_allowed_ones",
    "B05": "gptq:test_bad_group_size_raises autoround:test_wrong_group_size_of_integers_raises "
    "ct:test_group_size_that_does_not_divide_raises",
    "B06": "gptq:test_zeros_that_contradict_sym_raise gptq:test_desc_act_without_any_g_idx_raises "
    "gptq:test_bits_that_contradict_the_tensors_raise",
    "B09": "core:test_patterns_that_match_nothing_and_unknown_keys_are_reported "
    "awq:test_unknown_keys_give_one_warning_that_names_them",
    "B10": "gptq:test_files_that_disagree_raise_and_are_named "
    "awq:test_files_that_disagree_raise_conflict_naming_both "
    "nvfp4:test_two_files_that_disagree_are_refused",
    "B11": "core:test_announcing_code_in_the_config_runs_none "
    "autoround:test_keys_that_smell_of_code_are_inert",
    "B12": "core:test_invalid_regex_is_an_error_naming_it "
    "core:test_catastrophic_regex_ends_in_bounded_time "
    "core:test_long_substring_lists_are_reported_in_bounded_time",
    "B13": "core:test_patterns_that_match_nothing_and_unknown_keys_are_reported "
    "nvfp4:test_pattern_that_matches_nothing_is_reported",
    "B14": "ct:test_target_priority_is_the_librarys",
    "B15": "core:test_neighbours_that_agree_are_one_part "
    "autoround:test_mixed_bits_and_groups_inside_one_attention_are_read",
    "B16": "gptq:test_float_layer_among_packed_ones_is_a_mismatch "
    "ct:test_quantized_but_ignored_raises core:test_integer_weight_never_counts_as_float",
    "B17": "ct:test_bad_blocks_are_refused modelslim:test_bad_keys_are_named",
    "B18 ": "tests:test_b18_bom_is_accepted tests:test_b18_config_of_100_mb_is_refused_unread",
    "B19": "core:test_override_that_contradicts_the_checkpoint_is_refused_with_evidence",
    "B20": "core:test_two_claims_of_one_level_are_ambiguous_in_any_order",
    # C: tensors
    "C01 C02": "tests:test_no_tensor_can_be_lost_renamed_or_doubled "
    "core:test_all_missing_tensors_are_reported_at_once",
    "C03": "tests:test_same_parameter_under_two_names_raises_duplicate",
    "C04 C05": "gptq:test_wrong_shape_or_dtype_raises_and_names_the_tensor "
    "fp8:test_shapes_that_would_broadcast_are_refused "
    "fp8:test_wrong_types_are_refused_never_reinterpreted",
    "C06": "gptq:test_group_size_that_contradicts_the_tensors_raises "
    "core:test_check_groups_names_the_size_that_the_scales_imply",
    "C07": "gptq:test_last_short_group_is_read_without_padding "
    "modelslim:test_last_block_of_a_row_may_be_short "
    "quark:test_fp8_blocks_may_end_short_and_have_byte_scales "
    "nvfp4:test_columns_that_fill_no_whole_groups_are_refused",
    "C08": "cpu:test_linear_is_as_exact_as_float32_sums "
    "cpu:test_unsupported_operation_is_refused_with_its_axis",
    "C09": "core:test_scale_that_is_not_finite_is_an_error_with_its_place "
    "gptq:test_negative_scales_and_bias_are_kept fp8:test_zero_scale_over_zero_weights_is_allowed "
    "core:test_scale_that_overflows_half_is_refused",
    "C10 C11": "core:test_zero_groups_and_outliers_stay_finite "
    "core:test_nan_and_infinity_are_counted tests:test_nan_in_the_source_is_named",
    "C12": "gptq:test_v1_zero_of_zero_borrows_and_comes_back "
    "autoround:test_zero_of_zero_wraps_in_its_own_field",
    "C13": "gptq:test_symmetric_file_with_the_wrong_flag_is_read_by_its_values "
    "gptq:test_v1_file_read_as_v2_fails_the_weight_check",
    "C14": "gptq:test_bad_g_idx_raises ct:test_bad_g_idx_raises",
    "C15": "quark:test_matrix_that_is_not_orthogonal_is_refused ct:test_damaged_matrix_is_refused",
    "C16": "fp8:test_exponent_byte_255_is_refused_and_0_is_not_zero "
    "mxfp8:test_nan_scale_is_reported_and_byte_zero_is_no_zero",
    "C17": "fp8:test_nan_weights_are_counted "
    "core:test_nan_among_codes_is_named_with_tensor_count_and_place "
    "core:test_fn_to_fnuz_keeps_the_value_under_doubled_scales",
    "C18": "fp8:test_dividing_by_the_scale_misses_the_weights",
    "C19": "tests:test_fused_layer_equals_its_members_exactly "
    "ct:test_bad_global_scale_is_reported nvfp4:test_odd_single_scales_are_refused",
    "C20": "core:test_unlike_members_raise_layout_error_naming_the_reason "
    "core:test_members_apart_keep_their_order",
    "C21": "gptq:test_swapped_nibbles_give_another_weight "
    "awq:test_swapped_nibbles_give_other_weights",
    "C22": "bnb:test_scales_and_tables_that_are_not_finite_are_refused "
    "core:test_unlike_codebooks_raise_layout_error",
    "C23": "tests:test_packed_tied_embedding_is_held_once "
    "core:test_tied_linear_reads_the_embedding_and_owns_nothing",
    "C24": "tests:test_bias_missing_from_the_file_is_named "
    "tests:test_nonzero_bias_of_a_layer_without_bias_is_unexpected",
    "C25": "core:test_non_contiguous_input_gives_the_same_result "
    "core:test_non_contiguous_inputs_are_read_right",
    "C26": "core:test_experts_form_one_stack_and_a_gap_is_named "
    "core:test_number_of_an_expert_that_is_absurd_or_given_twice_is_named "
    "gptq:test_experts_with_unlike_rules_raise "
    "tests:test_c26_experts_without_tokens_and_one_with_all",
    "C27": "ct:test_kv_scheme_without_scales_is_warned_about "
    "ct:test_kv_scale_that_a_layer_lacks_is_missing "
    "ct:test_kv_scale_that_is_not_positive_is_refused",
    "C28": "tests:test_uneven_features_name_the_numbers_of_ranks_that_work "
    "tests:test_more_ranks_than_heads_hold_the_same_head",
    "C29": "tests:test_cut_through_a_group_is_exact "
    "core:test_cut_inside_an_opaque_block_names_sizes_that_work",
    "C30": "tests:test_c30_any_number_of_tokens_has_its_exact_shape",
    "C31": "tests:test_c31_sizes_beyond_31_bits_do_not_wrap",
    "C32": "tests:test_c32_no_poison_is_left_after_a_load "
    "core:test_forgotten_part_cannot_go_unnoticed",
    # D: GGUF
    "D01": "gguf:test_bad_magic gguf:test_bad_version gguf:test_big_endian_file_names_endianness",
    "D02": "gguf:test_counts_beyond_the_file_are_refused_before_any_loop",
    "D03": "gguf:test_bad_value_names_key_and_offset gguf:test_key_length_beyond_the_file "
    "gguf:test_empty_key gguf:test_duplicate_key",
    "D04": "gguf:test_bad_alignment",
    "D05": "gguf:test_bad_dimensions",
    "D06": "gguf:test_type_we_cannot_read_lists_supported",
    "D07": "gguf:test_row_no_multiple_of_block",
    "D08": "gguf:test_bad_offset_names_both_tensors "
    "gguf:test_data_cut_short_names_first_tensor_and_missing_bytes",
    "D09": "gguf:test_duplicate_tensor_name gguf:test_empty_or_over_long_tensor_name "
    "gguf:test_split_set_missing_parts_are_all_listed gguf:test_split_set_out_of_order_is_refused",
    "D10": "gguf:test_loading_a_broken_scale_raises_value_scale "
    "gguf:test_dequantize_random_blocks_equals_gguf_package",
    "D11": "gguf:test_hostile_tokens_are_kept_as_bytes "
    "gguf:test_hundred_million_tokens_declared_in_a_small_file",
    # E: plugins
    "E01": "core:test_plugin_that_raises_at_import_is_set_aside_and_others_work",
    "E02": "tests:test_e02_help_imports_no_plugin_and_the_table_says_what_an_import_took",
    "E03": "core:test_plugin_of_newer_api_is_set_aside_with_both_versions_and_a_fix",
    "E04": "core:test_malformed_plugin_is_rejected_whole_and_others_load",
    "E05": "core:test_two_dists_with_one_id_neither_wins "
    "core:test_block_type_of_two_plugins_is_used_of_neither_and_others_load",
    "E06": "core:test_detect_format_with_a_wrong_result_is_a_plugin_error "
    "core:test_hook_that_raises_is_named_and_does_not_hide_others "
    "core:test_answer_of_another_type_names_plugin_hook_and_what_was_expected "
    "core:test_plugin_whose_block_types_fail_is_set_aside_and_others_load",
    "E07": "core:test_kernel_that_fails_to_answer_is_left_out_with_a_warning "
    "core:test_kernel_that_raises_is_named_with_its_layer_and_the_cause_chained "
    "core:test_answer_of_another_form_is_named_too "
    "tests:test_e07_scheme_that_raises_midway_is_named_with_its_layer "
    "core:test_make_scheme_that_returns_none_is_a_plugin_error",
    "E08": "tests:test_e08_installed_plugins_leave_the_process_as_they_find_it "
    "tests:test_config_is_read_only",
    "E09": "tests:test_e09_stale_and_half_removed_distributions_are_named_and_others_work",
    "E10": "core:test_quant_plugins_names_absent_plugin_raises",
    "E11": "tests:test_e11_workers_have_the_same_plugins",
    "E12": "tests:test_unknown_format_names_the_dist_that_adds_it",
    "E13": "core:test_registry_is_loaded_once_under_threads tests:test_e13_threads_load_alike",
    "E14": "tests:test_e14_a_hundred_plugins_in_any_order_give_the_same_table",
    "E15": "tests:test_e15_names_outside_the_shipped_table_get_no_hint_to_install",
    "E16": "core:test_core_without_plugins_works_and_lists_none",
    # F: kernels and resources
    "F01": "core:test_forced_kernel_that_cannot_run_is_an_error_with_its_reason",
    "F02": "cpu:test_missing_library_is_a_reason_not_a_crash npu:test_elsewhere_it_is_not_offered",
    "F03": "core:test_forced_kernel_that_cannot_run_is_an_error_with_its_reason "
    "core:test_unknown_kernel_name_is_named",
    "F04": "tests:test_cache_that_may_only_be_read_is_used",
    "F05": "tests:test_f05_memory_that_ends_while_repacking_leaves_nothing_and_a_retry_works",
    "F06": "tests:test_f06_more_than_the_memory_there_is_ends_before_it_is_taken",
    "F07": "tests:test_f07_two_loads_and_any_number_of_threads_give_the_same_bits "
    "core:test_order_of_discovery_does_not_matter",
    "F08": "core:test_input_of_wrong_size_or_type_is_refused "
    "core:test_input_that_is_none_of_the_layer_is_the_callers_mistake",
    "F09": "core:test_nan_and_infinity_stay_visible_and_short_groups_stand_alone "
    "core:test_dtype_is_kept_zeros_stay_zeros_and_nan_is_seen",
    "F10": "core:test_compiles_without_graph_breaks core:test_deepcopy_and_state_dict_round_trip "
    "core:test_bound_kernel_pickles_and_ops_pass_opcheck",
    "F12": "tests:test_f12_interrupted_load_leaves_defaults_alone_and_the_next_one_works "
    "tests:test_f12_signal_ends_a_conversion_and_leaves_nothing",
    "F13": "tests:test_f13_odd_folder_names_load_and_convert "
    "tests:test_f13_read_only_folder_loads_and_is_left_alone",
    "F14": "tests:test_f14_bare_environment_optimised_or_strict_gives_the_same",
    "F15": "tests:test_quantized_source_is_refused",
    "F17": "tests:test_f17_a_hundred_loads_leave_no_file_and_no_tensor_behind",
}

ABSENT = {
    "F11": "quantized collectives are not part of this version",
    "F16": "automatic choice of widths is not part of this version",
}

COUNTS = {"A": 30, "B": 20, "C": 32, "D": 11, "E": 16, "F": 17}

TRAPS: dict[str, str] = {
    "1 a stored scale multiplies or divides": "fp8:test_dividing_by_the_scale_misses_the_weights "
    "ct:test_nvfp4_weights_miss_if_the_factor_multiplies_or_nibbles_swap "
    "mxfp8:test_scale_read_as_a_divisor_misses_the_weights",
    "2 shards with unequal scales": "tests:test_fused_layer_equals_its_members_exactly "
    "tests:test_one_scale_for_all_would_be_far_off",
    "3 rank of a scale for all": "fp8:test_single_scales_keep_their_stored_shape "
    "nvfp4:test_shapes_of_single_values_come_back nvfp4:test_fp8_blocks_may_be_ragged "
    "quark:test_single_scales_may_have_an_axis",
    "4 e8m0 is viewed, never cast": "core:test_torchs_own_cast_is_not_a_block_scale_rule "
    "core:test_dtype_changes_never_touch_codes_or_scales "
    "fp8:test_exponents_stored_as_plain_bytes_are_read_under_ue8m0 "
    "nvfp4:test_small_scales_are_bytes_that_no_cast_can_touch",
    "5 dtype and shape decide, and the config must agree": " "
    "ct:test_tensors_of_another_format_contradict "
    "nvfp4:test_config_of_other_weights_is_a_contradiction "
    "mxfp8:test_contradictions_of_config_and_tensors",
    "6 axis of 4-bit packing": "quark:test_the_other_pack_method_misses "
    "modelslim:test_worked_bytes_of_row_pairs nvfp4:test_int4_holds_two_rows_in_a_byte "
    "autoround:test_interleaved_words_taken_as_words_along_k_are_refused",
    "7 gate and up interleaved": "mxfp4:test_logits_miss_the_bound_with_gate_and_up_exchanged",
    "8 scale_bias is not in the mathematics": "modelslim:test_scale_bias_does_not_enter_the_result",
    "9 exclude lists": "core:test_pattern_dialects ct:test_ignore_entries "
    "nvfp4:test_excluded_names_are_shell_patterns_over_whole_names "
    "fp8:test_both_skip_lists_count_once_each_in_every_dialect "
    "quark:test_patterns_match_module_names_whatever_the_wrapper",
    "10 nothing stays unloaded": "core:test_forgotten_part_cannot_go_unnoticed "
    "tests:test_c32_no_poison_is_left_after_a_load",
    "11 overflow, fnuz": "core:test_fp8_overflow_saturates_where_a_bare_cast_differs_by_type "
    "core:test_fn_to_fnuz_keeps_the_value_under_doubled_scales "
    "core:test_same_byte_is_half_the_value_in_fnuz_except_three",
    "12 ties": "core:test_fp4_ties_equal_the_producers_codes "
    "tests:test_trap_12_two_producers_of_nvfp4_write_the_same_bytes",
    "13 a cut through a block": "tests:test_block_of_128_cut_at_64_is_exact "
    "tests:test_cut_through_a_group_is_exact",
    "14 a last short block": "modelslim:test_last_block_of_a_row_may_be_short "
    "mxfp8:test_short_last_block_reads_and_writes_exactly tests:test_cut_through_a_group_is_exact",
}
