"use strict";
(function () {
  var form = document.getElementById("filter");
  if (form) { startFilter(form); }
  startReadout();
  openForPrint();

  function startFilter(form) {
    var text = document.getElementById("filter-text");
    var count = document.getElementById("filter-count");
    var groups = Array.from(document.querySelectorAll("#groups > details"));
    var wasOpen = groups.map(function (group) { return group.open; });
    var rows = Array.from(document.querySelectorAll("#groups tbody tr"));
    form.hidden = false;

    function apply() {
      var words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      var severities = Array.from(form.querySelectorAll("input[name=severity]:checked"))
        .map(function (box) { return box.value; });
      var shown = 0;
      groups.forEach(function (group, index) {
        var inGroup = 0;
        group.querySelectorAll("tbody tr").forEach(function (row) {
          var content = (group.id + " " + row.textContent).toLowerCase();
          var fits = severities.indexOf(row.dataset.severity) >= 0 &&
            words.every(function (word) { return content.indexOf(word) >= 0; });
          row.hidden = !fits;
          inGroup += fits ? 1 : 0;
        });
        group.hidden = inGroup === 0;
        group.open = words.length ? inGroup > 0 : wasOpen[index];
        shown += inGroup;
      });
      count.textContent = shown + " of " + rows.length + " findings";
    }

    form.addEventListener("input", apply);
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.addEventListener("click", function (event) {
      var wanted = event.target.dataset && event.target.dataset.open;
      if (!wanted) { return; }
      groups.forEach(function (group, index) {
        group.open = wasOpen[index] = wanted === "yes";
      });
    });
    apply();
  }

  function startReadout() {
    var readout = document.getElementById("readout");
    if (!readout) { return; }
    ["pointerover", "click"].forEach(function (type) {
      document.addEventListener(type, function (event) {
        var cell = event.target.closest && event.target.closest("table.heat td[title]");
        if (cell) { readout.textContent = cell.title; }
      });
    });
  }

  function openForPrint() {
    var closed = [];
    window.addEventListener("beforeprint", function () {
      closed = Array.from(document.querySelectorAll("details:not([open])"));
      closed.forEach(function (part) { part.open = true; });
    });
    window.addEventListener("afterprint", function () {
      closed.forEach(function (part) { part.open = false; });
    });
  }
})();
